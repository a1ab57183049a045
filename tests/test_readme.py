"""The README says what the program does."""

import re

from conftest import ROOT

from config import build_parser

README = (ROOT / "README.md").read_text(encoding="utf-8")


def flags_table() -> list[str]:
    """One Markdown row for each flag of --help. `python tests/test_readme.py` prints them."""
    rows = []
    for group in build_parser()._action_groups:
        for action in group._group_actions:
            if action.dest == "help" or group.title == "modes (exactly one)":
                continue
            names = ", ".join(f"`{name}`" for name in action.option_strings)
            rows.append(f"| {names} | {action.help.replace('%%', '%').replace('|', '/')} |")
    return rows


def test_the_table_of_flags_is_that_of_help():
    start = README.index("| flag |")
    table = README[start : README.index("\n\n", start)].splitlines()[2:]
    assert table == flags_table()


def test_every_mode_is_in_the_table_of_modes():
    start = README.index("| mode |")
    table = README[start : README.index("\n\n", start)]
    (modes,) = [group for group in build_parser()._action_groups if group.title == "modes (exactly one)"]
    for action in modes._group_actions:
        assert f"`{action.option_strings[0]}" in table


def test_every_command_in_the_readme_parses():
    """Every `python main.py ...` line, but for files and runs that only a reader has."""
    parser, found = build_parser(), re.findall(r"^(?:\$ )?.*?python main\.py ([^\n`|#]+)", README, flags=re.M)
    assert len(found) >= 10
    for words in found:
        parser.parse_args(words.split())


if __name__ == "__main__":
    print("\n".join(flags_table()))
