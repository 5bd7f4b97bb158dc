"""How a teacher itself learns: conditioned on a pool of students (GTN, SFTN), or coached (online, meta, LGTM)."""
