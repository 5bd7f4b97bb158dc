"""A teacher that was trained to teach any student of a pool, against the plain one and one teacher per student."""
