"""The help of every command, option and argument is a sentence, or a noun phrase, of its own."""

from synface.cli import app
from typer.main import get_command

from tests.test_docstrings import FRAGMENT


def helps(name, command):
    """Yield the name and the help of a command, of what it takes, and of the commands below it."""
    yield name, command.help
    for param in command.params:
        yield f"{name} {param.opts[0]}", getattr(param, "help", None)
    for below, each in getattr(command, "commands", {}).items():
        yield from helps(f"{name} {below}", each)


def wrong_with(text):
    """Return what is wrong with a help text; None where nothing is."""
    if not text:
        return "there is none"
    if not text[0].isupper():
        return "it does not begin with an uppercase letter"
    if not text.rstrip().endswith("."):
        return "it does not end with a period"
    if text.split()[0].strip("`,.:;").lower() in FRAGMENT:
        return "it begins with a fragment"
    return None


def test_every_help_is_a_sentence_of_its_own():
    found = dict(helps("synface", get_command(app)))
    assert {"synface train --lr", "synface eval run", "synface recipe cfsm"} <= found.keys()
    wrong = {name: (wrong_with(text), text) for name, text in found.items() if wrong_with(text)}
    assert not wrong, "\n".join(f"{name}: {why}: {text}" for name, (why, text) in wrong.items())
