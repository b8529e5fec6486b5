"""All benchmarks as data: what is asked, with which settings, and how it is scored. A new one of a known kind is an entry.

Names are those of InternVL's ``evaluate.sh``, and so are prompts, settings and the files' places below the data folder.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from paddlemix.errors import ConfigError

from .llava import SETS as LLAVA_SETS
from .llava import load_llava
from .llava_scores import JUDGES, SCORERS, score_known
from .scorers import score_with

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
LETTER_CN = "请直接回答选项字母。"
_VIZWIZ = f"When the provided information is insufficient, respond with 'Unanswerable'. {SHORT}"
_CAPTION = "Provide a one-sentence caption for the provided image."
_REFER = "Please provide the bounding box coordinate of the region this sentence describes: <ref>{}</ref>"
_ADAPTATION = "InternVL-Domain-Adaptation-Data"

# Around a question with --cot, and how many tokens the reasoning may take.
COT = (
    "Your task is to answer the question below. Give step by step reasoning before you answer, and when you're ready to "
    'answer, please use the format "Final answer: .."\n\nQuestion:\n\n{}'
)
COT_TOKENS = 4096


@dataclass(frozen=True)
class Task:
    """A benchmark.

    Attributes:
        name: as users type it.
        loader: name of a function of :mod:`.loaders`, or a function ``(task, data_root) -> [Question]``.
        scorer: name of a scorer of :mod:`.scorers`, a function like one, or None where only a server can score.
        metric: the score that is meant where one is shown.
        max_new_tokens, min_new_tokens: bounds on the answer.
        files: what the loader reads, below the data folder.
        prompt: what follows or surrounds a question; its meaning is the loader's.
        tiling: ``each`` (every picture up to ``max_num`` tiles), ``shared`` (they share ``max_num``), ``pages`` (they share
            64), ``mmmu`` (all tiles are one picture's), ``frames`` (one tile each).
        marks: whether several pictures are numbered before the question: ``none``, ``several``, or ``tiles`` (where there is
            more than one tile).
        max_num: most tiles of a picture, unless the command says; ``always_dynamic``: tiled even without ``--dynamic``.
        submission: form of the server's file, of :mod:`.submissions`, or None.
        judge: kind of the judge's prompt, of :mod:`.judge`, or None.
        options: whatever else the loader needs.
        source: where the data is from.
    """

    name: str
    loader: str | Callable
    scorer: str | Callable | None
    metric: str
    max_new_tokens: int
    files: tuple = ()
    prompt: str = ""
    min_new_tokens: int = 1
    tiling: str = "each"
    marks: str = "none"
    max_num: int = 6
    always_dynamic: bool = False
    submission: str | None = None
    judge: str | None = None
    options: dict = field(default_factory=dict)
    source: str = ""

    @property
    def prediction_key(self):
        """The field of a prediction that is scored."""
        return "review" if self.scorer in ("llava_bench", "mmhal", "judged") else "answer"


def _vqa(name, rows, scorer, tokens=10, prompt=SHORT, **more):
    metric = {"vqa": "accuracy", "anls": "anls", "relaxed": "average", None: ""}.get(scorer, "accuracy")
    return Task(f"vqa-{name}", "vqa", scorer, metric, tokens, files=(rows,), prompt=prompt, **more)


def _refcoco(split, rows):
    return Task(
        split, "refcoco", "refcoco", "precision@1", 100, files=(f"refcoco/{rows}.jsonl",), prompt=_REFER, source="refer"
    )


def _caption(name, **more):
    more = dict(prompt=_CAPTION, min_new_tokens=8, **more)
    return Task(f"caption-{name}", "captions", "captions", "CIDEr", 30, **more)


def _mmbench(name, file, prompt, scored):
    scorer, metric = ("letter", "accuracy") if scored else (None, "")
    submission = "ccbench" if name.startswith("cc") else "mmbench"
    files = (f"mmbench/{file}",)
    return Task(name, "mmbench", scorer, metric, 100, files=files, prompt=prompt, submission=submission, source="mmbench")


def _rsvqa(name, rows, folder):
    options = {"folder": f"{_ADAPTATION}/images/{folder}"}
    files = (f"{_ADAPTATION}/val/{rows}",)
    more = dict(files=files, prompt=SHORT, options=options, source="adaptation")
    return Task(f"rsvqa-{name}", "rsvqa", "rsvqa", "useful_accuracy", 50, **more)


def _mmmu(name, split, scorer):
    more = dict(files=("MMMU",), tiling="mmmu", options={"split": split}, submission="by_id", source="mmmu")
    return Task(f"mmmu-{name}", "mmmu", scorer, "Overall" if scorer else "", 10, **more)


def _mmmu_pro(name, settings):
    options = {"settings": settings}
    return Task(name, "mmmu_pro", "mmmu_pro", "accuracy", 4096, files=("MMMU_Pro",), options=options, source="mmmu-pro")


_TASKS = [
    _caption(
        "coco", files=("coco/annotations/coco_karpathy_test.json", "coco/annotations/coco_karpathy_test_gt.json"), source="coco"
    ),
    _caption("flickr30k", files=("flickr30k/flickr30k_test_karpathy.json",), source="flickr30k"),
    _caption("nocaps", files=("nocaps/nocaps_val_4500_captions.json",), options={"folder": "nocaps/images"}, source="nocaps"),
    _vqa(
        "okvqa-val",
        "okvqa/okvqa_val.jsonl",
        "vqa",
        options={"truth": "okvqa/mscoco_val2014_annotations.json"},
        source="okvqa",
    ),
    _vqa(
        "textvqa-val",
        "textvqa/textvqa_val.jsonl",
        "vqa",
        options={"truth": "textvqa/textvqa_val_annotations.json"},
        source="textvqa",
    ),
    _vqa(
        "textvqa-val-ocr",
        "textvqa/textvqa_val_llava.jsonl",
        "vqa",
        options={"truth": "textvqa/textvqa_val_annotations.json"},
        source="textvqa",
    ),
    _vqa(
        "vizwiz-val",
        "vizwiz/vizwiz_val.jsonl",
        "vqa",
        prompt=_VIZWIZ,
        options={"truth": "vizwiz/vizwiz_val_annotations.json"},
        source="vizwiz",
    ),
    _vqa("vizwiz-test", "vizwiz/vizwiz_test.jsonl", None, prompt=_VIZWIZ, submission="vizwiz", source="vizwiz"),
    _vqa(
        "vqav2-val",
        "vqav2/vqav2_val.jsonl",
        "vqa",
        options={"truth": "vqav2/v2_mscoco_val2014_annotations.json"},
        source="vqav2",
    ),
    _vqa("vqav2-testdev", "vqav2/vqav2_testdev.jsonl", None, submission="question_id", source="vqav2"),
    _vqa("gqa-testdev", "gqa/llava_gqa_testdev_balanced_qwen_format.jsonl", "gqa", source="gqa"),
    _vqa("docvqa-val", "docvqa/val.jsonl", "anls", 100, options={"truth": "docvqa/val/val_v1.0.json"}, source="docvqa"),
    _vqa("docvqa-test", "docvqa/test.jsonl", None, 100, submission="questionId", source="docvqa"),
    _vqa(
        "infovqa-val",
        "infographicsvqa/val.jsonl",
        "anls",
        100,
        options={"truth": "infographicsvqa/infographicsVQA_val_v1.0_withQT.json"},
        source="docvqa",
    ),
    _vqa("infovqa-test", "infographicsvqa/test.jsonl", None, 100, submission="questionId", source="docvqa"),
    *(
        Task(
            f"vqa-mpdocvqa-{split}",
            "mpdocvqa",
            scorer,
            "anls" if scorer else "",
            100,
            files=(f"mpdocvqa/{split}.json",),
            prompt=SHORT,
            tiling="pages",
            marks="tiles",
            max_num=18,
            submission=None if scorer else "questionId",
            source="docvqa",
        )
        for split, scorer in (("val", "anls"), ("test", None))
    ),
    Task(
        "vqa-chartqa-test",
        "vqa",
        "relaxed",
        "average",
        100,
        files=("chartqa/test_human.jsonl", "chartqa/test_augmented.jsonl"),
        prompt=SHORT,
        options={"splits": ("human", "augmented")},
        source="chartqa",
    ),
    *(
        Task(
            f"vqa-chartqa-test-{half}",
            "vqa",
            "relaxed",
            half,
            100,
            files=(f"chartqa/test_{half}.jsonl",),
            prompt=SHORT,
            options={"splits": (half,)},
            source="chartqa",
        )
        for half in ("human", "augmented")
    ),
    _vqa("ocrvqa-val", "ocrvqa/ocrvqa_val.jsonl", "exact", 100, source="ocrvqa"),
    _vqa("ocrvqa-test", "ocrvqa/ocrvqa_test.jsonl", "exact", 100, source="ocrvqa"),
    _vqa("ai2d-test", "ai2diagram/test_vlmevalkit.jsonl", "exact", prompt="", source="ai2d"),
    *(_refcoco(f"{data}-{part}", f"{data}_{part}") for data in ("refcoco", "refcoco+") for part in ("val", "testA", "testB")),
    *(_refcoco(f"refcocog-{part}", f"refcocog_{part}") for part in ("val", "test")),
    Task("mme", "mme", "mme", "total", 20, files=("mme",), prompt=SHORT, source="mme"),
    Task(
        "pope",
        "pope",
        "pope",
        "f1",
        100,
        files=("pope/llava_pope_test.jsonl",),
        prompt=SHORT,
        options={"folder": "pope/val2014"},
        source="pope",
    ),
    _mmbench("mmbench-dev-en", "mmbench_dev_20230712.tsv", LETTER, True),
    _mmbench("mmbench-dev-cn", "mmbench_dev_cn_20231003.tsv", LETTER_CN, True),
    _mmbench("mmbench-test-en", "mmbench_test_en_20231003.tsv", LETTER, False),
    _mmbench("mmbench-test-cn", "mmbench_test_cn_20231003.tsv", LETTER_CN, False),
    _mmbench("ccbench-dev", "CCBench_legacy.tsv", LETTER_CN, True),
    Task(
        "scienceqa",
        "numbered_choices",
        "scienceqa",
        "accuracy",
        100,
        files=("scienceqa/scienceqa_test_img.jsonl",),
        prompt=LETTER,
        source="scienceqa",
    ),
    Task("m3cot", "numbered_choices", "scienceqa", "accuracy", 100, files=("M3CoT/test.jsonl",), prompt=LETTER, source="m3cot"),
    Task("mmvp", "mmvp", "mmvp", "pair_accuracy", 100, files=("MMVP/Questions.csv",), prompt=LETTER, source="mmvp"),
    Task("seed", "seed", "seed", "accuracy", 100, files=("SEED/seed.jsonl", "SEED/SEED-Bench.json"), source="seed"),
    _mmmu("dev", "dev", "mmmu"),
    _mmmu("val", "validation", "mmmu"),
    _mmmu("test", "test", None),
    _mmmu_pro("mmmu-pro", ("standard", "vision")),
    _mmmu_pro("mmmu-pro-std10", ("standard",)),
    _mmmu_pro("mmmu-pro-vision", ("vision",)),
    *(
        Task(
            f"mathvista-{split}",
            "mathvista",
            scorer,
            "accuracy" if scorer else "",
            4096,
            files=("MathVista",),
            options={"split": split},
            submission="mathvista",
            judge="mathvista" if scorer else None,
            source="mathvista",
        )
        for split, scorer in (("testmini", "mathvista"), ("test", None))
    ),
    Task("mvbench", "mvbench", "mvbench", "Avg", 1000, files=("MVBench/json",), tiling="frames", source="mvbench"),
    Task(
        "mmvet",
        "mmvet",
        "judged",
        "accuracy",
        1000,
        files=("mm-vet/llava-mm-vet.jsonl",),
        options={"folder": "mm-vet/images", "truth": "mm-vet/mm-vet.json"},
        submission="by_id",
        judge="mmvet",
        source="mmvet",
    ),
    Task(
        "mmvetv2",
        "mmvet_v2",
        "judged",
        "accuracy",
        1000,
        files=("mm-vet-v2/mm-vet-v2.json",),
        prompt="Answer this question in detail.",
        options={"folder": "mm-vet-v2/images"},
        submission="by_id",
        judge="mmvet",
        source="mmvet",
    ),
    Task(
        "llava-bench",
        "llava_bench",
        "llava_bench",
        "all",
        1000,
        files=("llava-bench-in-the-wild/questions.jsonl", "llava-bench-in-the-wild/context.jsonl"),
        prompt="Please give a detailed answer.",
        options={"folder": "llava-bench-in-the-wild/images"},
        submission="llava_bench",
        judge="llava_bench",
        source="llava-bench",
    ),
    Task(
        "mmhal",
        "mmhal",
        "mmhal",
        "average_score",
        1024,
        files=("mm-halbench/mmhal-bench_with_image.jsonl",),
        submission="mmhal",
        judge="mmhal",
        source="mmhal",
    ),
    Task(
        "tiny_lvlm",
        "tiny_lvlm",
        "tiny_lvlm",
        "overall",
        30,
        files=("tiny_lvlm/updated_datasets",),
        prompt=SHORT,
        source="tiny_lvlm",
    ),
    Task(
        "mmiu",
        "mmiu",
        "mmiu",
        "accuracy",
        100,
        files=("mmiu/mmiu.jsonl",),
        prompt=LETTER,
        tiling="shared",
        marks="several",
        max_num=12,
        source="mmiu",
    ),
    Task("mirb", "mirb", "mirb", "mean", 512, files=("MIRB",), tiling="shared", marks="several", source="mirb"),
    Task(
        "mantis", "mantis", "mantis", "overall", 50, files=("Mantis-Eval",), tiling="shared", marks="several", source="mantis"
    ),
    _rsvqa("lr", "rsvqa_l_test_instruct.json", "RSVQA_L/Images_LR"),
    _rsvqa("hr-test1", "rsvqa_h_test_1_instruct.json", "RSVQA-H/Data"),
    _rsvqa("hr-test2", "rsvqa_h_test_2_instruct.json", "RSVQA-H/Data"),
    Task(
        "dior-rsvg",
        "dior",
        "dior",
        "precision@1",
        200,
        files=(f"{_ADAPTATION}/val/dior_rsvg_test.json",),
        prompt="Detect {}",
        options={"folder": f"{_ADAPTATION}/images/dior-rsvg/JPEGImages"},
        source="adaptation",
    ),
    Task(
        "mme-realworld",
        "mme_realworld",
        "mme_realworld",
        "accuracy",
        100,
        files=(f"{_ADAPTATION}MME-RealWorld/val/MME_RealWorld.json",),
        options={
            "subtask": "Autonomous_Driving",
            "folder": f"{_ADAPTATION}MME-RealWorld/images/MME-RealWorld/data",
        },
        source="adaptation",
    ),
    Task(
        "drivelm",
        "drivelm",
        None,
        "",
        200,
        files=(f"{_ADAPTATION}/val/drivelm_val.jsonl",),
        options={"folder": f"{_ADAPTATION}/images/drivelm/stitch"},
        max_num=12,
        always_dynamic=True,
        submission="drivelm",
        source="adaptation",
    ),
    *(
        Task(
            name,
            load_llava,
            score_known(name),
            SCORERS.get(name, ("", ""))[1],
            128 if own.kind == "loader" else 1024,
            (own.questions,),
            submission="llava",
            judge=JUDGES.get(name),
            source="llava",
        )
        for name, own in LLAVA_SETS.items()
    ),
]
TASKS = {task.name: task for task in _TASKS}

# Names of evaluate.sh that stand for several.
GROUPS = {
    "caption": ("caption-flickr30k", "caption-coco", "caption-nocaps"),
    "vqa": ("vqa-okvqa-val", "vqa-textvqa-val", "vqa-vizwiz-val", "vqa-ai2d-test", "vqa-gqa-testdev"),
    "refcoco": tuple(name for name in TASKS if name.startswith("refcoco")),
}


def select(names):
    """Tasks by their names; a group stands for its members.

    Args:
        names: as on the command line, separated by commas.

    Raises:
        ConfigError: a name is not known.
    """
    chosen = []
    for name in filter(None, (part.strip() for part in names.split(","))):
        if name not in TASKS and name not in GROUPS:
            near = [known for known in TASKS if re.split("[-_]", name)[0] in known]
            raise ConfigError(f"--task '{name}' is not known: use {', '.join(near or TASKS)} or {', '.join(GROUPS)}")
        chosen += [TASKS[part] for part in GROUPS.get(name, (name,))]
    if not chosen:
        raise ConfigError("--task names no task: use one of `paddlemix evaluate --list`")
    return list({task.name: task for task in chosen}.values())


def with_options(task, **options):
    """``task`` with some of its loader's options replaced."""
    return replace(task, options={**task.options, **options})


def score(task, predictions, references, each=False):
    """Scores of answers to a task's questions, as the original's own scorer gives them.

    Args:
        task: a name of :data:`TASKS`, or a :class:`Task`.
        predictions: dictionaries with ``id`` and ``answer`` (of tasks with a judge ``review``), in any order. A question
            without one is wrong; what has no question is ignored.
        references: dictionaries with ``id`` and what the task's scorer needs.
        each: return ``(scores, one number for each reference)``.

    Returns:
        ``{name: number}``.

    Raises:
        ConfigError: the task is not known, or only a server can score it. DataError: ids are missing or not unique, or a
            reference lacks what is needed.
    """
    if not isinstance(task, Task):
        if task not in TASKS:
            raise ConfigError(f"task {task!r} is not known: use a name of paddlemix.evaluation.TASKS")
        task = TASKS[task]
    if task.scorer is None:
        raise ConfigError(f"{task.name} is scored by its server alone: send it the submission file")
    return score_with(task.scorer, predictions, references, each, key=task.prediction_key)
