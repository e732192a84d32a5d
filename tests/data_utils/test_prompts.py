"""The role-play prompt, part by part; test_build.py compares complete prompts with the published samples."""

import pytest

from data_utils.prompts import ImageInformation, Role, picture_line, prompt_language, role_play_prompt

WREN = Role("Wren", "The Lantern Coast", "A fiddler.")
NORA = Role("Nora", "Hypothetical Characters", "A baker.")
NOTHING = ImageInformation()


def test_a_comment_prompt_is_exact():
    assert role_play_prompt(WREN, None, NOTHING, [], "What do you see?") == (
        "Please step into the shoes of Wren from The Lantern Coast. Imagine you are talking with a curious human about "
        "the given image. This requires a deep understanding of the character's background, including their "
        "personality, experiences, abilities, and relationships.\n\n\n"
        "The description of Wren is as follows:\nA fiddler.\n\n\n"
        "Please respond to the following words of the curious human about the image in English using the distinctive "
        "tone, manner and vocabulary of Wren:\nWhat do you see?"
    )


def test_hypothetical_characters_are_introduced_in_their_own_way():
    prompt = role_play_prompt(NORA, None, NOTHING, [], "Hello")
    assert prompt.startswith("Please step into the shoes of Nora, a person who is one of the Hypothetical Characters. ")


def test_published_a_hypothetical_partner_keeps_the_comma():
    prompt = role_play_prompt(WREN, NORA, NOTHING, [], None)
    assert "talking with Nora, another person who is one of the Hypothetical Characters, about the given" in prompt


def test_the_partner_is_described_after_the_role():
    prompt = role_play_prompt(WREN, NORA, NOTHING, [], None)
    assert (
        "The description of Wren is as follows:\nA fiddler.\n\n\nThe description of Nora is as follows:\nA baker.\n\n\n"
        in prompt
    )


def test_published_auxiliary_lines_get_a_full_stop_and_lose_blanks_only_where_released():
    information = ImageInformation(role=" Wren ", place="At the beach.", scene=" They meet. ")
    prompt = role_play_prompt(WREN, None, information, [], "Hello")
    assert (
        "The auxiliary information of the image is as follows:\n"
        " - Character information:  Wren \n"
        " - Place information: At the beach..\n"
        " - Scene information: They meet.\n\n\n"
        "Please respond"
    ) in prompt


def test_empty_information_is_left_out_line_by_line():
    prompt = role_play_prompt(WREN, None, ImageInformation(place="A hill"), [], "Hello")
    assert "is as follows:\n - Place information: A hill.\n\n\nPlease respond" in prompt
    assert "auxiliary" not in role_play_prompt(WREN, None, NOTHING, [], "Hello")


def test_the_history_names_its_speakers_and_keeps_edge_blanks():
    prompt = role_play_prompt(WREN, None, NOTHING, [("human", " Hi "), ("Wren", "Oh!")], "And then?")
    assert (
        "The conversation history between Wren and the curious human is as follows:\n[human]:  Hi \n[Wren]: Oh!\n\n\n"
        "Please respond"
    ) in prompt


def test_without_last_words_the_role_begins():
    prompt = role_play_prompt(WREN, NORA, NOTHING, [], None)
    assert prompt.endswith(
        "Please initiate the conversation with Nora in English using the distinctive tone, manner and vocabulary of "
        "Wren, raising questions or commenting about the image."
    )


@pytest.mark.parametrize("script", ["西游记", "成龙历险记", "中国唐代"])
def test_characters_of_the_chinese_scripts_answer_in_chinese(script: str):
    prompt = role_play_prompt(Role("柳青舟", script, "诗人。"), None, NOTHING, [], "你好")
    assert "about the image in Chinese using" in prompt


def test_the_language_follows_the_script_and_not_the_name():
    assert prompt_language("Hypothetical Characters") == "English"
    assert "in English" in role_play_prompt(Role("柳青舟", "X-Men", "诗人。"), None, NOTHING, [], "你好")


def test_published_the_picture_line_has_a_blank_after_the_colon():
    assert picture_line("Friends/01.jpg") == "Picture 1: <img>images/Friends/01.jpg</img>\n"
