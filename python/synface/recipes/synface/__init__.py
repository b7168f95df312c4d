"""SynFace: identity and domain mixup (Qiu et al., ICCV 2021), and its study of data."""
