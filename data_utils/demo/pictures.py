"""Draws the demo's pictures: one coloured thing in a landscape, with characters beside it."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image, ImageDraw

WIDTH, HEIGHT = 400, 300
_SCALE = 3  # drawn larger and then reduced, for smooth edges
_LINE = (45, 42, 50)

COLOURS = {
    "red": (214, 58, 52),
    "blue": (58, 104, 204),
    "yellow": (246, 206, 66),
    "green": (44, 148, 84),
    "purple": (136, 78, 176),
    "orange": (240, 138, 48),
}
PLACES = ("beach", "hill", "snow", "lake")
TIMES = ("noon", "evening", "night")
_SKIES = {
    "noon": ((112, 180, 236), (206, 232, 248)),
    "evening": ((92, 84, 150), (250, 178, 122)),
    "night": ((14, 20, 50), (52, 66, 116)),
}
_GROUNDS = {"beach": (232, 210, 158), "hill": (122, 176, 92), "snow": (240, 245, 250), "lake": (78, 138, 176)}
_DARK = (14, 20, 54)
_DIM = {"noon": 1.0, "evening": 0.84, "night": 0.55}

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Scene:
    """What a picture shows: a thing of a colour, a place, a time of day, and people by the colours of their coats."""

    thing: str
    colour: str
    place: str
    time: str
    coats: tuple[str, ...] = ()


@dataclass
class _Pen:
    """Draws in picture coordinates on the enlarged canvas, every shape with a dark outline."""

    canvas: ImageDraw.ImageDraw

    def polygon(self, points: list[tuple[float, float]], fill: Colour) -> None:
        enlarged = [_enlarged(*point) for point in points]
        self.canvas.polygon(enlarged, fill=fill)
        self.canvas.line([*enlarged, enlarged[0], enlarged[1]], fill=_LINE, width=2 * _SCALE, joint="curve")

    def ellipse(self, x: float, y: float, half_width: float, half_height: float, fill: Colour) -> None:
        box = (*_enlarged(x - half_width, y - half_height), *_enlarged(x + half_width, y + half_height))
        self.canvas.ellipse(box, fill=fill, outline=_LINE, width=2 * _SCALE)

    def pie(self, x: float, y: float, radius: float, start: int, end: int, fill: Colour) -> None:
        box = (*_enlarged(x - radius, y - radius), *_enlarged(x + radius, y + radius))
        self.canvas.pieslice(box, start, end, fill=fill, outline=_LINE, width=2 * _SCALE)

    def line(self, points: list[tuple[float, float]], colour: Colour = _LINE, width: int = 2) -> None:
        self.canvas.line([_enlarged(*point) for point in points], fill=colour, width=width * _SCALE, joint="curve")


def draw_scene(scene: Scene, rng: random.Random) -> Image.Image:
    """Draw ``scene`` as an RGB picture of 400 x 300; the same scene and state of ``rng`` give the same pixels.

    Args:
        scene: What to show; its words are keys of COLOURS, PLACES, TIMES and THINGS.
        rng: Shifts things a little, so that two pictures of one scene differ.
    """
    picture = Image.new("RGB", (WIDTH * _SCALE, HEIGHT * _SCALE))
    pen = _Pen(ImageDraw.Draw(picture))
    _draw_sky(pen, scene.time, rng)
    _draw_ground(pen, scene.place, scene.time)
    spread = 70 if scene.coats else 110
    x = WIDTH / 2 + rng.randint(-spread, spread) * (0.4 if scene.coats else 1)
    THINGS[scene.thing](pen, x, COLOURS[scene.colour])
    if scene.coats and scene.place == "lake":
        _draw_bank(pen, scene.time)
    sides = (-1, 1) if len(scene.coats) == 2 else (rng.choice((-1, 1)),)
    for side, coat in zip(sides, scene.coats, strict=False):
        _draw_person(pen, WIDTH / 2 + side * 145, COLOURS[coat])
    return picture.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)


def _draw_sky(pen: _Pen, time: str, rng: random.Random) -> None:
    top, bottom = _SKIES[time]
    for row in range(HEIGHT * _SCALE):
        share = min(row / (HEIGHT * _SCALE * 0.65), 1.0)
        pen.canvas.line([(0, row), (WIDTH * _SCALE, row)], fill=_mixed(top, bottom, share))
    x = rng.choice((55, 345))
    if time == "night":
        for _ in range(40):
            star_x, star_y = _enlarged(rng.uniform(0, WIDTH), rng.uniform(0, HEIGHT * 0.55))
            size = rng.choice((2, 3, 4))
            pen.canvas.ellipse((star_x, star_y, star_x + size, star_y + size), fill=(255, 250, 220))
        _disc(pen, x, 48, 22, (244, 240, 214))
    elif time == "evening":
        _disc(pen, x, 165, 30, (255, 216, 140))
    else:
        _disc(pen, x, 48, 26, (255, 238, 130))
        for cloud_x in (rng.randint(110, 180), rng.randint(230, 300)):
            _draw_cloud(pen, cloud_x, rng.randint(30, 60))


def _draw_cloud(pen: _Pen, x: float, y: float) -> None:
    for shift, radius in ((-18, 10), (0, 15), (18, 11)):
        _disc(pen, x + shift, y + (15 - radius) / 2, radius, (250, 252, 255))


def _draw_ground(pen: _Pen, place: str, time: str) -> None:
    ground = _dimmed(_GROUNDS[place], time)
    bottom = [_enlarged(WIDTH, HEIGHT), _enlarged(0, HEIGHT)]
    if place == "beach":
        sea = _dimmed((70, 150, 190), time)
        pen.canvas.rectangle((*_enlarged(0, 190), *_enlarged(WIDTH, 230)), fill=sea)
        edge = [_enlarged(x, 226 + 4 * math.sin(x / 23)) for x in range(0, WIDTH + 1, 4)]
        pen.canvas.polygon([*edge, *bottom], fill=ground)
    elif place == "lake":
        shore = [_enlarged(x, 178 - 18 * math.sin(x / 61) - 8 * math.sin(x / 17)) for x in range(0, WIDTH + 1, 4)]
        pen.canvas.polygon([*shore, *bottom], fill=_dimmed((86, 120, 96), time))
        pen.canvas.rectangle((*_enlarged(0, 195), *_enlarged(WIDTH, HEIGHT)), fill=ground)
        for x, y in ((40, 215), (150, 285), (250, 220), (330, 278), (90, 262)):
            pen.line([(x, y), (x + 40, y)], _mixed(ground, (255, 255, 255), 0.35))
    else:
        height = 46 if place == "hill" else 14
        edge = [_enlarged(x, 222 - height * math.sin(math.pi * x / WIDTH)) for x in range(0, WIDTH + 1, 4)]
        pen.canvas.polygon([*edge, *bottom], fill=ground)
        if place == "snow":
            for x, base in ((28, 226), (372, 224), (70, 220)):
                _draw_fir(pen, x, base, time)


def _draw_bank(pen: _Pen, time: str) -> None:
    edge = [_enlarged(x, 262 + 3 * math.sin(x / 19)) for x in range(0, WIDTH + 1, 4)]
    bank = _dimmed(_GROUNDS["hill"], time)
    pen.canvas.polygon([*edge, _enlarged(WIDTH, HEIGHT), _enlarged(0, HEIGHT)], fill=bank)


def _draw_fir(pen: _Pen, x: float, base: float, time: str) -> None:
    green = _dimmed((52, 100, 76), time)
    for step in range(3):
        y = base - 16 * step
        half = 17 - 4 * step
        pen.canvas.polygon([_enlarged(x - half, y), _enlarged(x + half, y), _enlarged(x, y - 28)], fill=green)


def _draw_person(pen: _Pen, x: float, coat: Colour) -> None:
    for side in (-1, 1):
        pen.line([(x + 7 * side, 258), (x + 8 * side, 282)], width=5)
    pen.polygon([(x - 10, 212), (x + 10, 212), (x + 21, 264), (x - 21, 264)], coat)
    for side in (-1, 1):
        pen.line([(x + 10 * side, 219), (x + 23 * side, 243)], width=5)
    pen.ellipse(x, 198, 13, 14, (240, 204, 174))
    pen.pie(x, 195, 14, 180, 360, (86, 62, 48))
    for side in (-1, 1):
        pen.canvas.ellipse((*_enlarged(x + 5 * side - 1.5, 199), *_enlarged(x + 5 * side + 1.5, 202)), fill=_LINE)


def _draw_kite(pen: _Pen, x: float, colour: Colour) -> None:
    tail = [(x + 9 * math.sin(step / 2.2), 152 + 5 * step) for step in range(14)]
    pen.line(tail)
    pen.polygon([(x, 48), (x + 42, 94), (x, 152), (x - 42, 94)], colour)
    pen.line([(x, 48), (x, 152)])
    pen.line([(x - 42, 94), (x + 42, 94)])


def _draw_balloon(pen: _Pen, x: float, colour: Colour) -> None:
    for side in (-1, 1):
        pen.line([(x + 30 * side, 124), (x + 12 * side, 158)])
    pen.ellipse(x, 88, 50, 54, colour)
    pen.ellipse(x, 88, 20, 54, _mixed(colour, (255, 255, 255), 0.45))
    pen.polygon([(x - 14, 158), (x + 14, 158), (x + 11, 178), (x - 11, 178)], (158, 112, 66))


def _draw_house(pen: _Pen, x: float, colour: Colour) -> None:
    pen.polygon([(x - 56, 176), (x + 56, 176), (x + 56, 250), (x - 56, 250)], colour)
    pen.polygon([(x - 70, 178), (x, 124), (x + 70, 178)], (118, 84, 70))
    pen.polygon([(x - 12, 208), (x + 12, 208), (x + 12, 250), (x - 12, 250)], (92, 64, 50))
    for side in (-1, 1):
        window = [(x + 36 * side - 11, 192), (x + 36 * side + 11, 192), (x + 36 * side + 11, 214)]
        pen.polygon([*window, (x + 36 * side - 11, 214)], (252, 240, 190))


def _draw_tent(pen: _Pen, x: float, colour: Colour) -> None:
    pen.polygon([(x, 146), (x + 74, 252), (x - 74, 252)], colour)
    pen.polygon([(x, 172), (x + 24, 252), (x - 24, 252)], (72, 58, 56))
    pen.line([(x, 146), (x, 132)], width=3)


def _draw_umbrella(pen: _Pen, x: float, colour: Colour) -> None:
    pen.line([(x, 130), (x, 250)], (110, 82, 60), width=5)
    pen.pie(x, 188, 68, 180, 360, colour)
    pale = _mixed(colour, (255, 255, 255), 0.5)
    pen.polygon([(x - 23, 188), (x, 120), (x + 23, 188)], pale)


def _draw_flower(pen: _Pen, x: float, colour: Colour) -> None:
    pen.line([(x, 170), (x, 262)], (64, 150, 70), width=6)
    for side in (-1, 1):
        pen.ellipse(x + 20 * side, 228, 18, 8, (78, 142, 78))
    for petal in range(6):
        angle = petal * math.pi / 3
        pen.ellipse(x + 31 * math.cos(angle), 160 + 31 * math.sin(angle), 20, 20, colour)
    pen.ellipse(x, 160, 17, 17, (250, 232, 160))


def _draw_boat(pen: _Pen, x: float, colour: Colour) -> None:
    pen.line([(x, 128), (x, 222)], (92, 66, 48), width=4)
    pen.polygon([(x + 5, 130), (x + 62, 206), (x + 5, 206)], colour)
    pen.polygon([(x - 5, 142), (x - 46, 206), (x - 5, 206)], _mixed(colour, (255, 255, 255), 0.45))
    pen.polygon([(x - 68, 216), (x + 72, 216), (x + 48, 248), (x - 46, 248)], (134, 92, 62))


def _draw_duck(pen: _Pen, x: float, colour: Colour) -> None:
    pen.polygon([(x + 66, 212), (x + 100, 220), (x + 66, 228)], (244, 160, 60))
    pen.polygon([(x - 84, 206), (x - 40, 224), (x - 46, 250)], colour)
    pen.ellipse(x, 240, 66, 34, colour)
    pen.ellipse(x + 48, 208, 27, 26, colour)
    pen.ellipse(x - 10, 240, 34, 17, _mixed(colour, (0, 0, 0), 0.2))
    pen.ellipse(x + 56, 202, 4, 4, (250, 250, 250))


THINGS: dict[str, Callable[[_Pen, float, Colour], None]] = {
    "kite": _draw_kite,
    "balloon": _draw_balloon,
    "house": _draw_house,
    "tent": _draw_tent,
    "umbrella": _draw_umbrella,
    "flower": _draw_flower,
    "boat": _draw_boat,
    "duck": _draw_duck,
}
AFLOAT = frozenset({"boat", "duck"})
IN_THE_AIR = frozenset({"kite", "balloon"})


def fitting_places(thing: str) -> tuple[str, ...]:
    """Return the places where ``thing`` can be: boats on the lake only, houses not."""
    if thing in AFLOAT:
        return ("lake",)
    return PLACES if thing in IN_THE_AIR else tuple(place for place in PLACES if place != "lake")


def _disc(pen: _Pen, x: float, y: float, radius: float, fill: Colour) -> None:
    pen.canvas.ellipse((*_enlarged(x - radius, y - radius), *_enlarged(x + radius, y + radius)), fill=fill)


def _enlarged(x: float, y: float) -> tuple[float, float]:
    return x * _SCALE, y * _SCALE


def _dimmed(colour: Colour, time: str) -> Colour:
    return _mixed(_DARK, colour, _DIM[time])


def _mixed(first: Colour, second: Colour, share: float) -> Colour:
    """Return ``first`` with a ``share`` (0 to 1) of ``second``."""
    return tuple(round(a + (b - a) * share) for a, b in zip(first, second, strict=True))
