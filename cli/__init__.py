"""What a person types and reads. The only package that imports all the others."""
