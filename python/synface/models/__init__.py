"""Backbones: networks that embed a face. The package imports no other one of synface."""

# Residual blocks of each stage of the published IResNets, which `models.iresnet` builds.
PRESETS = {
    "iresnet18": (2, 2, 2, 2),
    "iresnet34": (3, 4, 6, 3),
    "iresnet50": (3, 4, 14, 3),
    "iresnet100": (3, 13, 30, 3),
}
SHORT = {name.replace("iresnet", "r"): name for name in PRESETS}  # insightface's names, such as r50
