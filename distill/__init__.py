"""From data and a teacher to a trained student. Imports only `profiles`."""
