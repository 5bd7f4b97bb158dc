"""What the student matches: one file per objective, composed in `compose.py`.

The recipe's side is in `section.py`, which is light; import the rest from its own modules, they need torch.
"""
