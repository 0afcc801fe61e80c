"""What notebooks and command line print most, in English and Korean; all else is English."""

import os

LANGUAGE_VARIABLE = "BRIDGEBLIP_LANGUAGE"
LANGUAGES = ("auto", "en", "ko")

MESSAGES: dict[str, tuple[str, str]] = {
    "where": (
        "{place}, Python {python}; working in {folder}",
        "{place}, Python {python}; 작업 폴더 {folder}",
    ),
    "ready": ("all requirements are there", "필요한 패키지가 모두 있습니다"),
    "installing": ("installing {packages}", "설치하는 중: {packages}"),
    "copied": (
        "reading the copy of {source} in {target}; to change something, change it in {source}",
        "{source}의 사본을 {target}에서 읽습니다. 고칠 것은 {source}에서 고치십시오",
    ),
    "unpacked": (
        "reading {source} as unpacked in {target}",
        "{source}의 압축을 {target}에 풀어 읽습니다",
    ),
    "storing": (
        "waiting until Drive has stored every file; keep this page open",
        "Drive에 모두 저장될 때까지 기다립니다. 이 페이지를 닫지 마십시오",
    ),
    "stored": (
        "all is on Drive, and Drive is no longer mounted: to go on in this notebook, choose Run "
        "all again",
        "모두 Drive에 저장했고 Drive 연결을 해제했습니다. 이 노트북을 이어서 쓰려면 "
        '"모두 실행"을 다시 누르십시오',
    ),
    "can_start": (
        "problems: {problems}, warnings: {warnings}; this stage can start",
        "문제 {problems}개, 경고 {warnings}개: 시작할 수 있습니다",
    ),
    "would_fail": (
        "problems: {problems}, warnings: {warnings}; this stage would fail",
        "문제 {problems}개, 경고 {warnings}개: 이대로는 실패합니다. 위의 problem부터 해결하십시오",
    ),
    "few": (
        "{count} distinct pictures are few: their profile is taken ({words})",
        "서로 다른 사진이 {count}장뿐이라 소량 데이터용 설정을 적용합니다({words})",
    ),
    "begin": ("starting from step 0", "처음부터 학습을 시작합니다"),
    "resume": ("going on from {state}", "{state}부터 이어서 학습합니다"),
    "training": ("training", "학습"),
    "validating": ("validating", "검증"),
    "answering": ("answering", "추론"),
    "orders_pay": (
        "asking in other orders too pays below a margin of {margin:.2f}",
        "상위 두 답의 확률 차이가 {margin:.2f}보다 작은 문항은 선택지 순서를 바꿔 다시 물으면 "
        "이득입니다",
    ),
    "orders_idle": (
        "asking in other orders too does not pay",
        "선택지 순서를 바꿔 다시 물어도 이득이 없습니다",
    ),
    "verdict": (
        "Validation questions: {sentence} More in {report}",
        "검증 문항: {sentence} 자세한 내용은 {report}",
    ),
    "nothing": (
        "Nothing can be concluded: {pictures} of at least {fewest} pictures that are needed",
        "사진 {pictures}장으로는 아무 결론도 낼 수 없습니다(최소 {fewest}장 필요)",
    ),
    "known": (
        "the model has learned from {learned} of the {pictures} pictures",
        "사진 {pictures}장 중 {learned}장은 모델이 학습한 것",
    ),
    "leaked": ("Don't believe this score: {known}.", "이 점수를 믿지 마십시오. {known}입니다."),
    "collapsed": (
        "Don't believe this score: {share:.0%} of all answers are {letter}.",
        "이 점수를 믿지 마십시오. 답의 {share:.0%}가 {letter}입니다.",
    ),
    "guessing": (
        "Don't believe this score: its interval reaches down to guessing, {guessing:.1%}.",
        "이 점수를 믿지 마십시오. 신뢰 구간이 찍기 수준({guessing:.1%})까지 내려갑니다.",
    ),
    "blind": (
        "Don't believe that it looks at the pictures: without them it scores {blank:.1%}.",
        "사진을 보고 답한다고 믿지 마십시오. 사진 없이도 {blank:.1%}를 맞힙니다.",
    ),
    "care": (
        "Believe it with care, between {low:.1%} and {high:.1%}: {doubts}.",
        "조심해서 믿으십시오. {low:.1%}에서 {high:.1%} 사이입니다. 주의할 점: {doubts}.",
    ),
    "few_pictures": ("{pictures} pictures are few", "사진 {pictures}장은 적음"),
    "not_blind_tested": (
        "whether it looks at the pictures was not measured",
        "사진을 보고 답하는지 측정하지 않음",
    ),
    "not_better": (
        "it is not shown to beat '{name}', {share:.1%}",
        "'{name}'({share:.1%})보다 낫다는 증거가 없음",
    ),
    "believe": (
        "Believe it, for questions and pictures like these: between {low:.1%} and {high:.1%}, "
        "better than each simpler way that was tried, and looking at the pictures is worth "
        "{points:.1f} points.",
        "이와 비슷한 질문과 사진이라면 믿어도 됩니다. {low:.1%}에서 {high:.1%} 사이이고, 비교한 더 "
        "단순한 방식을 모두 앞섭니다. 사진을 보고 답해서 얻는 몫은 {points:.1f}%p입니다.",
    ),
    "wrote": (
        "wrote {out} and {probabilities}: {rows} answers",
        "{out}, {probabilities} 저장: 답 {rows}개",
    ),
    "problem_rows": (
        "{count} rows could not be answered as they stand, see {file} beside it:",
        "그대로는 답할 수 없는 행이 {count}개 있습니다. 함께 저장한 {file} 파일을 보십시오:",
    ),
    "took": (
        "{minutes:.1f} minutes, {rate:.0f} questions a second, {memory} at the peak",
        "{minutes:.1f}분, 초당 {rate:.0f}문항, 최대 메모리 {memory}",
    ),
    "best": (
        "best of {count} epochs, validation accuracy {accuracy:.3f}",
        "에포크 {count}개 중 최고, 검증 정확도 {accuracy:.3f}",
    ),
    "best_epoch": (
        "best epoch: {metric} {score:.3f}",
        "가장 좋은 에포크: {metric} {score:.3f}",
    ),
    "next_train": (
        "next: open torchscript.ipynb and choose Run all; it takes {file} ({why})",
        '다음: torchscript.ipynb를 열고 "모두 실행"을 누르십시오. 사용하는 파일: {file}({why})',
    ),
    "next_export": (
        "next: open torchscript_inference.ipynb and choose Run all; it takes {file}, "
        "{size:,.1f} MB",
        '다음: torchscript_inference.ipynb를 열고 "모두 실행"을 누르십시오. '
        "사용하는 파일: {file}({size:,.1f} MB)",
    ),
    "next_answer": ("next: hand in {file}", "다음: {file} 파일을 제출하십시오"),
}


def language(chosen: str | None = None) -> str:
    """Return "en" or "ko": ``chosen``, else what the environment asks for, else the locale."""
    chosen = chosen or os.environ.get(LANGUAGE_VARIABLE, "auto")
    if chosen == "auto":
        names = ("LC_ALL", "LC_MESSAGES", "LANG")
        chosen = next(filter(None, map(os.environ.get, names)), "en")
    return "ko" if chosen.startswith("ko") else "en"


def say(name: str, /, **values) -> str:
    """Return a message of the table in the reader's language."""
    return MESSAGES[name][language() == "ko"].format(**values)
