"""HyperFace: packed against random identities (ICLR 2025)."""
