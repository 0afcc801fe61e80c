"""Every message has both languages, and each is used."""

import re
import string

import pytest
from conftest import ROOT

from bridgeblip import InputError
from bridgeblip.hosting.runtime import set_up
from bridgeblip.messages import LANGUAGE_VARIABLE, MESSAGES, language, say

HANGUL = re.compile("[가-힣]")


def placeholders(text: str) -> list[tuple]:
    return sorted({part[1:] for part in string.Formatter().parse(text) if part[1]})


def test_the_table_is_short():
    assert len(MESSAGES) <= 40


@pytest.mark.parametrize("name", MESSAGES)
def test_both_languages_say_it_with_the_same_values(name):
    english, korean = MESSAGES[name]
    assert HANGUL.search(korean) and not HANGUL.search(english)
    assert placeholders(english) == placeholders(korean)


def test_every_message_is_said_somewhere_and_no_other():
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "bridgeblip").rglob("*.py")]
    sources += [path.read_text(encoding="utf-8") for path in ROOT.glob("*.ipynb")]
    said = set(re.findall(r'\bsay\(\s*\\?"(\w+)\\?"', "\n".join(sources)))
    assert said == MESSAGES.keys()


@pytest.mark.parametrize(
    "env, expected",
    [
        ({}, "en"),
        ({"LANG": "ko_KR.UTF-8"}, "ko"),
        ({"LANG": "ko_KR.UTF-8", "LC_ALL": "C"}, "en"),
        ({LANGUAGE_VARIABLE: "ko", "LANG": "C"}, "ko"),
        ({LANGUAGE_VARIABLE: "en", "LANG": "ko_KR"}, "en"),
        ({LANGUAGE_VARIABLE: "auto", "LANG": "ko_KR"}, "ko"),
    ],
)
def test_the_language_is_what_was_chosen_or_the_locales(env, expected, monkeypatch):
    for name in (LANGUAGE_VARIABLE, "LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert language() == expected
    assert bool(HANGUL.search(say("ready"))) == (expected == "ko")


def test_the_notebooks_setting_holds_and_another_is_refused(monkeypatch, capsys):
    monkeypatch.setenv(LANGUAGE_VARIABLE, "auto")
    monkeypatch.chdir(ROOT)
    set_up(language="ko")
    assert "작업 폴더" in capsys.readouterr().out and language() == "ko"
    with pytest.raises(InputError, match="LANGUAGE is 'fr': expected one of auto, en, ko"):
        set_up(language="fr")
