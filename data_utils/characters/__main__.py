"""Adds a character of your own to a data root: `python -m data_utils.characters ROOT --name NAME --profile FILE`.

    python -m data_utils.characters ROOT --name "Ada Reed" --script "The Lighthouse" --profile ada.txt \\
        --image tower.jpg --about "The tower where Ada lives." --question "What do you see here?"
    python -m data_utils.characters ROOT --folder Ada_Reed
    python -m data_utils.characters ROOT --card ada.png
    python -m data_utils.characters ROOT --export_card "Ada Reed" ada.png

ROOT is created, or added to, in the published layout: profiles/<split>/{profiles,roles}.json, images/<script>/NN.jpg
and images/annotations.json. A folder holds profile.txt (or profile.md) and optionally pictures, each with a description
in a text file of the same name. ROOT/data/play/<name>.json then asks the questions about each picture, for
inference.sh --input_dir ROOT/data/play; a character without pictures is shown a plain one. A card is a
Tavern card (V1, V2, V3), the format in which role-play front ends exchange characters: JSON, PNG or .charx.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from data_utils.characters.cards import character_from_card, export_card
from data_utils.characters.importer import NewCharacter, Picture, add_character, read_folder, read_text
from data_utils.errors import MMRoleError, run_main, shown
from data_utils.files import read_json
from data_utils.layout import SPLITS
from data_utils.prompts import HYPOTHETICAL_CHARACTERS


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m data_utils.characters",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("root", type=Path, metavar="ROOT", help="a data root, new or existing")
    parser.add_argument("--name", help="the character's name (default: that of --folder)")
    parser.add_argument(
        "--script", help=f"what the character is from ({HYPOTHETICAL_CHARACTERS}; a card's: its first tag)"
    )
    parser.add_argument("--profile", type=Path, metavar="FILE", help="the profile, a text file")
    parser.add_argument("--folder", type=Path, help="a folder with profile.txt and pictures, instead or in addition")
    parser.add_argument("--card", type=Path, metavar="FILE", help="a character card, instead of a profile")
    parser.add_argument(
        "--export_card", nargs=2, metavar=("NAME", "FILE"), help="write a character of ROOT as a card, in a PNG"
    )
    parser.add_argument("--image", type=Path, action="append", default=[], metavar="FILE", help="repeatable")
    parser.add_argument("--about", action="append", default=[], metavar="TEXT", help="what the image shows, in order")
    parser.add_argument("--place", action="append", default=[], metavar="TEXT", help="where it is, in order")
    parser.add_argument("--who", action="append", default=[], metavar="TEXT", help="who is on it, in order")
    parser.add_argument("--question", action="append", default=[], metavar="TEXT", help="what to ask; repeatable")
    parser.add_argument("--split", choices=SPLITS, default=SPLITS[0], help="the first one trains (%(default)s)")
    options = parser.parse_args(arguments)
    if options.export_card:
        name, out = options.export_card
        export_card(options.root, name, Path(out))
        print(f"{name} is written to {Path(out).resolve()}")
        return
    character = _character(options)
    path = add_character(options.root, character, options.question)
    print(f"{character.name} ({character.script}) is in {options.root.resolve()}")
    print(f"{len(read_json(path))} questions written to {path.resolve()}")


def _character(options: argparse.Namespace) -> NewCharacter:
    if options.card:
        if options.folder or options.profile or options.image or options.about or options.place or options.who:
            fix = "give the card alone; a second call adds pictures"
            raise MMRoleError("a card is a whole character", None, "--folder, --profile, --image and its texts", fix)
        character, notes = character_from_card(
            options.card, name=options.name, script=options.script, split=options.split
        )
        for note in notes:
            print(f"note: {shown(note)}", file=sys.stderr, flush=True)
        return character
    profile, pictures, name = "", [], options.name
    if options.folder:
        profile, pictures = read_folder(options.folder)
        name = name or options.folder.resolve().name.replace("_", " ")
    if options.profile:
        profile = read_text(options.profile)
    if not name or not (options.folder or options.profile):
        fix = "give --name and --profile, or --folder, or --card"
        raise MMRoleError("a character needs a name and a profile", None, "the command line", fix)
    details = (options.about, options.place, options.who)
    for flag, texts in zip(("--about", "--place", "--who"), details, strict=True):
        if len(texts) > len(options.image):
            raise MMRoleError("more texts than images", texts, flag, "give one after each --image, in their order")
    filled = [[*texts, *[""] * (len(options.image) - len(texts))] for texts in details]
    pictures += [Picture(*values) for values in zip(options.image, *filled, strict=True)]
    return NewCharacter(name, options.script or HYPOTHETICAL_CHARACTERS, profile, pictures, options.split)


if __name__ == "__main__":
    sys.exit(run_main(main))
