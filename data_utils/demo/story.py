"""The demo's made-up characters and its texts in English and Chinese, from a small stock of sentences."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

from data_utils.demo.pictures import COLOURS, IN_THE_AIR, Scene
from data_utils.prompts import HUMAN, HYPOTHETICAL_CHARACTERS, prompt_language

SCRIPTS = ("The Lantern Coast", "The Clockwork Valley", "The Amber Isles")
CHINESE_SCRIPT = "中国唐代"
NAMES = {
    "English": (
        "Marlow Finch", "Odessa Pike", "Bram Tolliver", "Wren Hollis",
        "Nora Lindqvist", "Tomas Abara", "Ines Castellan", "Idris Vale",
    ),
    "Chinese": ("柳青舟", "沈墨白", "陆小渔", "顾长风"),
}  # fmt: skip

# By trade: a sentence about a thing, and a catchphrase.
TRADES = {
    "English": {
        "lighthouse keeper": ("The {thing} would guide my ships home.", "Keep the lamp burning!"),
        "clockmaker": ("The {thing} keeps good time, like my clocks.", "Tick by tick, my friend!"),
        "baker": ("The {thing} looks as warm as my bread.", "Flour and fire, that is life!"),
        "gardener": ("The {thing} grows on me like a rose.", "Water it and wait!"),
        "mapmaker": ("I shall draw the {thing} on my map.", "North is where the heart is!"),
        "fiddler": ("The {thing} makes me play a merry tune.", "One more song before dark!"),
    },
    "Chinese": {
        "诗人": ("这{thing}值得我写一首诗。", "有诗便有春天！"),
        "船夫": ("这{thing}正好陪我的船回家。", "顺水好行舟！"),
        "画师": ("我要把这{thing}画进画里。", "一笔一山河！"),
        "茶商": ("看着这{thing}，我想泡一壶茶。", "好茶待好友！"),
    },
}
# By temper: the opening of each answer, and a description for the profile.
TEMPERS = {
    "English": {
        "cheerful": ("Ha ha!", "laughs before every answer and sees the good in all things"),
        "gruff": ("Hmph!", "grumbles before every answer but has a kind heart"),
        "dreamy": ("Ah, lovely!", "sighs before every answer and loves quiet places"),
        "curious": ("Oh, wonderful!", "marvels before every answer and wants to know everything"),
    },
    "Chinese": {
        "开朗": ("哈哈！", "开口先笑，凡事都往好处想"),
        "沉静": ("嗯。", "话不多，喜欢安静的地方"),
        "豪爽": ("好！", "说话痛快，待人大方"),
        "温和": ("呵呵。", "说话和气，从不着急"),
    },
}
WORDS: dict[str, dict[str, str]] = {
    "English": {
        "noon": "at noon", "evening": "in the evening", "night": "at night",
        "beach": "at the beach", "hill": "on the hill", "snow": "in the snow", "lake": "on the lake",
        "above beach": "above the beach", "above hill": "above the hill",
        "above snow": "above the snow", "above lake": "above the lake",
    },
    "Chinese": {
        "red": "红色", "blue": "蓝色", "yellow": "黄色", "green": "绿色", "purple": "紫色", "orange": "橙色",
        "kite": "风筝", "balloon": "气球", "house": "房子", "tent": "帐篷", "umbrella": "大伞", "flower": "花",
        "boat": "小船", "duck": "鸭子",
        "a kite": "一只", "a balloon": "一个", "a house": "一座", "a tent": "一顶", "a umbrella": "一把",
        "a flower": "一朵", "a boat": "一艘", "a duck": "一只",
        "noon": "中午", "evening": "傍晚", "night": "夜里",
        "beach": "海滩上", "hill": "山坡上", "snow": "雪地上", "lake": "湖面上",
        "above beach": "海滩上空", "above hill": "山坡上空", "above snow": "雪地上空", "above lake": "湖面上空",
    },
}  # fmt: skip
COMMENT_QUESTIONS = {
    "English": (
        "What do you see in this image?",
        "What comes to your mind when you look at this image?",
        "How does this image make you feel?",
        "Please tell me about this image.",
    ),
    "Chinese": (
        "你在这张图片里看到了什么？",
        "看到这张图片，你想到了什么？",
        "这张图片给你什么感觉？",
        "请说说这张图片。",
    ),
}
COMMENT_ANSWERS = {
    "English": "{opening} I see {a_thing} {place} {time}. {view} {catchphrase}",
    "Chinese": "{opening}{time}{place}有{a_thing}。{view}{catchphrase}",
}
# What the human asks and the character answers; the first pair opens every dialogue.
HUMAN_ROUNDS = {
    "English": (
        ("Look at this image, {me}! What do you see?", "{opening} I see {a_thing} {place}. {view}"),
        ("What colour is the {thing}?", "{opening} The {thing} is {colour}, and my coat is {coat}."),
        ("When was this image made?", "{opening} It was made {time}. {catchphrase}"),
        ("Where would you like to be?", "{opening} By the {thing} {place}. {catchphrase}"),
        ("Does it remind you of your work?", "{opening} I am a {trade}, so it does. {view}"),
    ),
    "Chinese": (
        ("{me}，看看这张图片！你看到了什么？", "{opening}我看到{place}有{a_thing}。{view}"),
        ("{thing}是什么颜色的？", "{opening}{thing}是{colour}的，我的衣服是{coat}的。"),
        ("这是什么时候？", "{opening}这是{time}。{catchphrase}"),
        ("你想去哪里？", "{opening}我想去{place}看{thing}。{catchphrase}"),
        ("这让你想起你的工作吗？", "{opening}我是{trade}，当然会。{view}"),
    ),
}
# Two characters in turn; a dialogue is cut after three to six turns, so some have an odd number, as the published ones.
PAIR_TURNS = {
    "English": (
        "{opening} Look, {you}! There is {a_thing} {place}.",
        "{opening} I see it too, {you}. {view}",
        "{opening} Do you like that {colour} {thing}, {you}?",
        "{opening} I do, {you}. It goes well with my {coat} coat.",
        "{opening} It is good to be here {time}. {catchphrase}",
        "{opening} So it is, {you}. {catchphrase}",
    ),
    "Chinese": (
        "{opening}{you}，快看！{place}有{a_thing}。",
        "{opening}我也看到了，{you}。{view}",
        "{opening}{you}，你喜欢这{colour}的{thing}吗？",
        "{opening}喜欢，{you}。它和我{coat}的衣服很配。",
        "{opening}{time}在这里真好。{catchphrase}",
        "{opening}是啊，{you}。{catchphrase}",
    ),
}
PLAIN = {"English": "The image shows {a_thing} {place} {time}.", "Chinese": "图片里，{time}{place}有{a_thing}。"}
ASSISTANT = {
    "English": "As an AI assistant, I can describe the image for you. It shows {a_thing} {place}.",
    "Chinese": "作为一个人工智能助手，我来为您描述图片：{place}有{a_thing}。",
}
PROFILES = {
    "English": (
        "### Brief Introduction\n{me} is a {trade} {origin}. Everyone knows {me} by the {coat} coat.\n"
        "### Personality\n{me} is {temper}. As a {temper} {trade}, {me} {manner}.\n"
        "### Life Story\n{me} learned to be a {trade} as a child and has done nothing else for {years} years. "
        'Every answer of {me} begins with "{opening}" and many end with a catchphrase.\n'
        "### Main Interpersonal Relationships\n- **{you}**: a good friend, who is a {friend_trade}.\n"
        '### Catchphrases\n1. "{catchphrase}"'
    ),
    "Chinese": (
        "### 简要介绍\n{me}，{origin}的{trade}，总是穿着{coat}的衣服。\n"
        "### 性格特点\n{me}性格{temper}，{manner}，说话总以“{opening}”开头。\n"
        "### 人物经历\n{me}自幼学做{trade}，至今已有{years}年。\n"
        "### 人际关系\n- **{you}**：好友，是一位{friend_trade}。\n"
        "### 名言\n1. “{catchphrase}”"
    ),
}
YEARS = {"English": ("ten", "twenty", "thirty", "forty"), "Chinese": ("十", "二十", "三十", "四十")}


@dataclass(frozen=True)
class Persona:
    """A made-up character; ``trade`` and ``temper`` are keys of TRADES and TEMPERS in its language."""

    name: str
    script: str
    split: str
    trade: str
    temper: str
    coat: str
    years: str

    @property
    def language(self) -> str:
        """The language this character speaks."""
        return prompt_language(self.script)


def draw_cast(rng: random.Random) -> list[Persona]:
    """Draw three pairs of friends: of a story, of the Tang dynasty, and, out of distribution, hypothetical people."""
    coats = rng.sample(sorted(COLOURS), 6)
    english, chinese = (
        {
            "name": rng.sample(NAMES[language], count),
            "trade": rng.sample(sorted(TRADES[language]), count),
            "temper": rng.sample(sorted(TEMPERS[language]), count),
            "years": rng.sample(YEARS[language], count),
        }
        for language, count in (("English", 4), ("Chinese", 2))
    )
    origins = [(rng.choice(SCRIPTS), "in-distribution")] * 2 + [(HYPOTHETICAL_CHARACTERS, "out-of-distribution")] * 2
    drawn = [(english, index, *origins[index]) for index in range(4)]
    drawn[2:2] = [(chinese, index, CHINESE_SCRIPT, "in-distribution") for index in range(2)]
    return [
        Persona(script=script, split=split, coat=coat, **{field: pool[field][index] for field in pool})
        for (pool, index, script, split), coat in zip(drawn, coats, strict=True)
    ]


def write_profile(persona: Persona, friend: Persona) -> str:
    """Return the profile of ``persona`` under the published headings."""
    manner = TEMPERS[persona.language][persona.temper][1]
    if persona.script == HYPOTHETICAL_CHARACTERS:
        origin = "from a small town"
    else:
        origin = persona.script if persona.language == "Chinese" else f"from {persona.script}"
    own = {"origin": origin, "manner": manner, "temper": persona.temper, "years": persona.years}
    words = _person_words(persona, friend) | own | {"friend_trade": friend.trade}
    return PROFILES[persona.language].format_map(words)


def say(templates: Mapping[str, str], scene: Scene, persona: Persona, friend: Persona) -> str:
    """Return the sentence of ``templates`` (by language) that ``persona`` says to ``friend`` about ``scene``."""
    return templates[persona.language].format_map(_person_words(persona, friend) | _scene_words(scene, persona))


def describe(scene: Scene, language: str) -> str:
    """Describe ``scene`` plainly, out of character."""
    return PLAIN[language].format_map(_scene_phrases(scene, language))


def comment_turns(scene: Scene, persona: Persona, friend: Persona, rng: random.Random) -> list[dict[str, str]]:
    """Return a comment: a question of the human and the character's answer."""
    question = rng.choice(COMMENT_QUESTIONS[persona.language])
    # published: the first turn of a comment says "from" where all other turns say "role".
    return [
        {"from": HUMAN, "value": question},
        {"role": persona.name, "value": say(COMMENT_ANSWERS, scene, persona, friend)},
    ]


def human_turns(scene: Scene, persona: Persona, friend: Persona, rng: random.Random) -> list[dict[str, str]]:
    """Return two or three rounds of the human asking and the character answering."""
    rounds = [0, *sorted(rng.sample(range(1, len(HUMAN_ROUNDS["English"])), rng.choice((1, 2))))]
    turns = []
    for number in rounds:
        question, answer = ({lang: pairs[number][half] for lang, pairs in HUMAN_ROUNDS.items()} for half in (0, 1))
        turns.append({"role": HUMAN, "value": say(question, scene, persona, friend)})
        turns.append({"role": persona.name, "value": say(answer, scene, persona, friend)})
    return turns


def pair_turns(scene: Scene, persona: Persona, friend: Persona, rng: random.Random) -> list[dict[str, str]]:
    """Return three to six turns of two characters; either may begin."""
    speakers = (persona, friend) if rng.random() < 0.5 else (friend, persona)
    return [
        {
            "role": speakers[turn % 2].name,
            "value": say(
                {language: turns[turn] for language, turns in PAIR_TURNS.items()},
                scene,
                speakers[turn % 2],
                speakers[(turn + 1) % 2],
            ),
        }
        for turn in range(rng.randint(3, 6))
    ]


def annotate(scene: Scene, people: list[Persona], rng: random.Random) -> dict[str, str]:
    """Return an annotation as the published ones are; each part may be empty."""
    language = people[0].language if people else "English"
    names = [person.name for person in people]
    if language == "Chinese":
        role = f"从左到右依次是{'和'.join(names)}。" if len(names) > 1 else f"图中是{names[0]}。"
        scene_info = f"{'和'.join(names)}在这里见面。"
    else:
        role = f"From left to right are {' and '.join(names)}." if len(names) > 1 else names[0]
        scene_info = f"{' and '.join(names)} {'meet' if len(names) > 1 else 'rests'} here."
    place = WORDS[language][scene.place]
    return {
        "role_info": role,
        "place_info": (place[0].upper() + place[1:]) if rng.random() < 0.7 else "",
        "scene_info": scene_info if rng.random() < 0.5 else "",
    }


def _person_words(persona: Persona, friend: Persona) -> dict[str, str]:
    words = WORDS[persona.language]
    return {
        "me": persona.name,
        "you": friend.name,
        "trade": persona.trade,
        "coat": words.get(persona.coat, persona.coat),
        "opening": TEMPERS[persona.language][persona.temper][0],
        "catchphrase": TRADES[persona.language][persona.trade][1],
    }


def _scene_words(scene: Scene, persona: Persona) -> dict[str, str]:
    phrases = _scene_phrases(scene, persona.language)
    return phrases | {"view": TRADES[persona.language][persona.trade][0].format_map(phrases)}


def _scene_phrases(scene: Scene, language: str) -> dict[str, str]:
    words = WORDS[language]
    thing, colour = words.get(scene.thing, scene.thing), words.get(scene.colour, scene.colour)
    if language == "Chinese":
        a_thing = f"{words['a ' + scene.thing]}{colour}的{thing}"
    else:
        a_thing = f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {thing}"
    place = words[f"above {scene.place}" if scene.thing in IN_THE_AIR else scene.place]
    return {"thing": thing, "colour": colour, "a_thing": a_thing, "place": place, "time": words[scene.time]}
