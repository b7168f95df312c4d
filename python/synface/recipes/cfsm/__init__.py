"""CFSM: controllable and guided face synthesis (Liu et al., ECCV 2022)."""

from ...common.lazy import lazy

__getattr__ = lazy(
    __name__,
    {
        "config": ("CfsmConfig", "DataConfig", "GuidedConfig", "StyleConfig", "load_config"),
        "faces": ("People", "degraded", "first_images", "read_people"),
        "guided": ("VARIANTS", "guided_gain", "train_guided"),
        "recipe": ("Results", "run"),
        "report": ("conclusions", "measured", "write"),
        "style": ("learn_style", "measure_style", "similarities", "strength_sweep"),
    },
)
