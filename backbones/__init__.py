"""The four backbones, a file each. Read base.py first: it says what a backbone owes to the rest."""
