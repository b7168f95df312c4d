"""The recipes' configurations: the defaults are read and written back, and bad ones are named."""

import pytest
from synface.common.config import to_toml
from synface.recipes import cfsm, gap, hyperface, synface
from synface.recipes.synface import study


@pytest.mark.parametrize("recipe", [cfsm, gap, hyperface, study, synface], ids=lambda x: x.__name__)
def test_the_default_is_read_and_written_back(tmp_path, recipe):
    config = recipe.load_config()
    file = tmp_path / "copy.toml"
    file.write_text(to_toml(config))
    assert recipe.load_config(file) == config


@pytest.mark.parametrize("recipe", [cfsm, gap, hyperface, study, synface], ids=lambda x: x.__name__)
def test_the_quick_size_is_smaller_and_for_the_default_alone(tmp_path, recipe):
    quick, whole = recipe.load_config(quick=True), recipe.load_config()
    assert quick != whole
    for key in ("generator", "faces"):  # not replaced, so the default's
        assert getattr(quick.data, key, None) == getattr(whole.data, key, None)
    file = tmp_path / "copy.toml"
    file.write_text(to_toml(quick))
    assert recipe.load_config(file) == quick
    with pytest.raises(ValueError, match=r"has no effect on .*copy\.toml"):
        recipe.load_config(file, quick=True)


@pytest.mark.parametrize(
    ("recipe", "text", "message"),
    [
        (cfsm, "sead = 1", "tiny.toml: unknown key 'sead'; did you mean 'seed'"),
        (cfsm, "[style]\nstep = 1", r"\[style\]: unknown key 'step'"),
        (cfsm, "[style]\nsteps = 1.5", r"\[style\]: steps must be int, got 1.5"),
        (cfsm, "[guided]\nother_originals = ['0.7']", "each of other_originals must be float, got"),
        (
            cfsm,
            "[guided]\nother_epsilons = [[0.1]]",
            "each of other_epsilons must be float, got",
        ),
        (cfsm, "domains = [1]", "each of domains must be str, got 1"),
        (cfsm, "[style]\nsteps = true", r"\[style\]: steps must be int, got True"),
        (cfsm, "[style]\nsteps = 0", r"\[style\]: steps must be at least 1, got 0"),
        (cfsm, "[style]\northogonality = 'l2'", "orthogonality must be one of"),
        (cfsm, "[guided]\noriginals = 1.5", r"originals must be in \[0, 1\], got 1.5"),
        (cfsm, "[guided]\nepsilon = nan", "epsilon must be finite"),
        (cfsm, "[guided]\ndomain = 'dark'", r"guided.domain must be one of domains, \['mixed'\]"),
        (cfsm, "domains = ['foggy']", r"domains must be distinct names of .*, got \['foggy'\]"),
        (cfsm, "domains = 'dark'", "domains must be tuple, got 'dark'"),
        (cfsm, "style = 3", "style must be a table, got 3"),
        (cfsm, "[recognizer]\nepochs = 0", r"\[recognizer\]: epochs must be positive"),
        (cfsm, "[recogniser]\nepochs = 0", r"\[recogniser\]: epochs must be positive"),
        (cfsm, "[recogniser]\n[recognizer]", "recogniser is the earlier name of recognizer: give"),
        (cfsm, "[generator]\nlatent = 3", "latent must be at least styles = 10"),
        (cfsm, "seed = ", "tiny.toml is not TOML"),
        (gap, "strengths = [0.5]", r"one of them 1, .*, got \[0.5\]"),
        (gap, "strengths = [1, 1.0]", r"strengths must be different, .*, got \[1, 1.0\]"),
        (gap, "strengths = [1, -1]", "strengths must"),
        (gap, "samples = [1]", r"one of them at least 2, got \[1\]"),
        (gap, "samples = []", r"one of them at least 2, got \[\]"),
        (gap, "samples = [2, 0]", "samples must be at least 1, got 0"),
        (gap, "[data]\nreal_identities = 1", "real_identities must be at least 2, got 1"),
        (hyperface, "[pack]\nstep = 1", r"\[pack\]: unknown key 'step'; did you mean 'steps'"),
        (hyperface, "[pack]\nsteps = 0", "steps must be at least 1, got 0"),
        (hyperface, "[pack]\nobjective = 'best'", "objective must be one of .*, got 'best'"),
        (hyperface, "[data]\nidentities = 1", "identities must be at least 2, got 1"),
        (
            hyperface,
            "[data]\nimages_per_identity = 0",
            "images_per_identity must be at least 1, got 0",
        ),
        (hyperface, "seeds = [0, 0]", "seeds must be different"),
        (
            hyperface,
            "kinds = ['random', 'pack']",
            r"kinds must be distinct names of random, packed, .*, got \['random', 'pack'\]",
        ),
        (hyperface, "kinds = ['packed']", r"kinds must be two or more, .*, got \['packed'\]"),
        (hyperface, "kinds = 'packed'", "kinds must be tuple, got 'packed'"),
        (hyperface, "recognizer_seed = 3", "recognizer_seed must be none of seeds, .*, got 3"),
        (hyperface, "recognizer_seed = -1", "recognizer_seed must be at least 0, got -1"),
        (hyperface, "recognizer_epochs = 0", "recognizer_epochs must be at least 1, got 0"),
        (hyperface, "[pack]\ngallery = 0", "gallery must be at least 1, got 0"),
        (hyperface, "[pack]\nalpha = -1", "alpha must be finite and ≥ 0, got -1"),
        (hyperface, "[pack]\ncandidates = 0", "candidates must be at least 1, got 0"),
        (study, "identity = [2]", "tiny.toml: unknown key 'identity'; did you mean 'identities'"),
        (study, "identities = 20", "identities must be tuple, got 20"),
        (study, "identities = [1]", "identities must be at least 2, got 1"),
        (study, "identities = [9, 4]", r"identities must be increasing .*, got \[9, 4\]"),
        (study, "images = []", r"images must be increasing and not empty, got \[\]"),
        (
            study,
            "attributes = ['pose', 'pose']",
            r"attributes must be distinct, got \['pose', 'pose'\]",
        ),
        (study, "[train]\nlr = -1", r"\[train\]: lr must be positive"),
        (synface, "sead = 1", "tiny.toml: unknown key 'sead'; did you mean 'seeds'"),
        (
            synface,
            "[data]\nidentity = 1",
            r"\[data\]: unknown key 'identity'; did you mean 'identities'",
        ),
        (synface, "[data]\nidentities = 1", "identities must be at least 2, got 1"),
        (synface, "[data]\nsize = 4", "size must be at least 8, got 4"),
        (synface, "seeds = []", r"seeds must be different, and at least one, got \[\]"),
        (synface, "seeds = [1, 1]", r"seeds must be different, and at least one, got \[1, 1\]"),
        (synface, "seeds = [-1]", "seeds must be at least 0, got -1"),
        (
            synface,
            "rows = ['mixup']",
            r"rows must be distinct names of synthetic, .*, got \['mixup'\]",
        ),
        (synface, "[train]\nepochs = 0", r"\[train\]: epochs must be positive"),
        (synface, "seeds = ", "tiny.toml is not TOML"),
    ],
)
def test_a_bad_configuration_is_named(tmp_path, recipe, text, message):
    file = tmp_path / "tiny.toml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        recipe.load_config(file)
