"""Make pairs for preference training of questions whose answers are known: the model that shall learn answers them itself.

  python -m paddlemix.datasets.preference.build META.json OUTPUT_DIR --model_name_or_path OpenGVLab/InternVL2-8B

reads a meta file as fine-tuning does. ``--method sample`` asks each question several times at a temperature, and pairs right
answers with wrong ones: by comparison with the record's own answer, or by a judge behind an address (--judge). ``--method
continue`` lets the model go on from half of the record's answer without the picture: that is the rejected one, and the record's
own the chosen one.

OUTPUT_DIR gets ``meta.json`` and a file of pairs for each data set, for ``paddlemix mpo --meta_path``; ``answers.jsonl`` has
all that the model said. Started again after it was ended, it goes on; pairs are made anew of the same answers with another
--judge or --pairs_per_question.
"""

import argparse
import json
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import paddlemix
from paddlemix.commands import Parser, positive
from paddlemix.datasets.encoding import DataOptions, SampleEncoder, marked
from paddlemix.datasets.records import VIDEO_PLACEHOLDER, read_meta
from paddlemix.errors import ConfigError, DataError, UserError, command_main
from paddlemix.files import lock, read_json, whole_lines, write_whole
from paddlemix.models.blocks.conversation import IMAGE_PLACEHOLDER
from paddlemix.processors.media import Remote

from .grading import is_right, pair, verdict

DEMO_MODEL = Path(paddlemix.__file__).parent / "demo_model"
_JUDGED_AT_ONCE = 8


class Lines:
    """A file of JSON objects, a line each, that grows: whole lines of an earlier run are there, one that was cut is not.

    Args:
        path: of the file.

    Attributes:
        rows: what is in it, by ``(set, index)``.

    Raises:
        DataError: another run writes to it, a line is not this command's, or it cannot be written.
    """

    def __init__(self, path):
        self.path, self.rows = Path(path), {}
        try:
            self._file = open(path, "ab+")  # noqa: SIM115 - closed by close
            lock(self._file, "another folder")
            for number, line in whole_lines(self._file):
                self._note(line, number)
        except OSError as error:
            raise DataError(f"{path} cannot be written ({error.strerror}): make room, or use another folder") from None

    def _note(self, line, number):
        try:
            row = json.loads(line)
            self.rows[row["set"], row["index"]] = row
        except (ValueError, LookupError, TypeError, RecursionError):
            raise DataError(f"{self.path}: line {number} is none of this command's: use another folder") from None

    def add(self, row):
        """Write a row, whole before the next."""
        self._file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        self.rows[row["set"], row["index"]] = row

    def close(self):
        """What was written is on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


class Question:
    """A record as a question with its right answer.

    Attributes:
        record: the :class:`~paddlemix.datasets.records.Record`.
        system: of the conversation, or None.
        asked: the user's texts, the last one the question.
        said: the answers before.
        truth: the record's last answer.

    Raises:
        DataError: the conversation does not end in an answer.
    """

    def __init__(self, record, turns=None):
        turns = list(record.conversations if turns is None else turns)
        self.record = record
        self.system = turns.pop(0)["value"] if turns and turns[0]["from"] == "system" else None
        while turns and turns[0]["from"] != "human":
            turns.pop(0)
        if not turns or len(turns) % 2 or any(turn["from"] != ("human", "gpt")[i % 2] for i, turn in enumerate(turns)):
            raise DataError("must be questions and answers in turn, of which the last is the right answer")
        self.asked, answers = ([turn["value"] for turn in turns[first::2]] for first in (0, 1))
        *self.said, self.truth = answers

    def rounds(self):
        """``[(question, answer), ...]``, the last answer being None."""
        return list(zip(self.asked, [*self.said, None]))

    def with_instruction(self, text):
        """The same question with ``text`` below its last part."""
        if text:
            self.asked[-1] = f"{self.asked[-1]}\n{text}"
        return self


class Asker:
    """A model that answers questions several times, or goes on from half of their answers.

    Args:
        args: the command's flags.
    """

    def __init__(self, args):
        from paddlemix import device
        from paddlemix.models.blocks.chat import end_of_answer
        from paddlemix.models.blocks.many import suit_threads
        from paddlemix.models.internvl2 import InternVLChatModel, load_tokenizer

        device.set_device(args.device)
        self.args = args
        self.model = InternVLChatModel.from_pretrained(args.model_name_or_path, dtype=args.dtype)
        if self.model.routes:
            raise ConfigError(f"{args.model_name_or_path} takes coarse forms of tiles: take the model that it was made of")
        suit_threads(self.model)
        self.tokenizer = load_tokenizer(args.model_name_or_path)
        self.model.set_tokenizer(self.tokenizer)
        self.template = self.model.template().with_system_message(self.model.system_message)
        changes = dict(sampling_method="middle", min_num_frame=args.num_segments, max_num_frame=args.num_segments)
        if args.max_num:
            changes |= dict(max_dynamic_patch=args.max_num, min_dynamic_patch=1)
        options = DataOptions.from_config(self.model.config, **changes)
        self.encoder = SampleEncoder(self.tokenizer, self.template, options)
        settings = dict(max_new_tokens=args.max_new_tokens, do_sample=args.temperature > 0, seed=args.seed, top_p=args.top_p)
        settings |= dict(temperature=args.temperature or 1.0)
        self.config = end_of_answer(settings, self.template, self.tokenizer, self.model)
        self._heads = {}  # (text before, ids) that the answers to a question go on from

    def prompts(self, key, record):
        """(ids, pictures) of a record for each of its answers.

        Raises:
            UserError: the record cannot be used.
        """
        from paddlemix.models.blocks.chat import digested, place_pictures

        if self.args.method == "continue":
            ids = self._half(key, Question(record))
            return [(ids, []) for _ in range(self.args.samples)]
        tiles = self.encoder.tiles_of(record, 0)
        turns = marked(record, len(tiles), self.encoder.options.frame_format)
        question = Question(record, turns).with_instruction(self.args.instruction)
        counts = [len(each) * self.model.config.num_image_token for each in tiles]
        ids = self.model.prompt_ids(self.tokenizer, self._template(question), question.rounds(), counts)
        pictures = [found for each in tiles for found in digested(each, [len(each)])]
        return [(ids, place_pictures(ids, self.model, pictures)) for _ in range(self.args.samples)]

    def _template(self, question):
        return self.template.with_system_message(question.system)

    def _half(self, key, question):
        """Ids of a question without its pictures, and of the first half of its answer."""
        bare = [re.sub(f"({IMAGE_PLACEHOLDER}|{VIDEO_PLACEHOLDER})\n?", "", text) for text in question.asked]
        head = first_half(question.truth)
        template = self._template(question)
        prompt = template.prompt(bare[-1], list(zip(bare, question.said))) + template.lead + template.learned("")
        plain, ids = (self.tokenizer.encode(text) for text in (prompt, prompt + head))
        start = next((i for i, (a, b) in enumerate(zip(ids, plain)) if a != b), len(plain))
        self._heads[key] = head, ids[start:]
        return ids

    def _text(self, key, answer):
        if self.args.method == "sample":
            return answer.text
        head, ids = self._heads[key]
        before, whole = (self.tokenizer.decode(part, skip_special_tokens=True) for part in (ids, [*ids, *answer.ids]))
        return (head + whole[len(before) :]).strip()

    def answers(self, questions):
        """Ask.

        Args:
            questions: an iterator of ((set, index), record or an error).

        Yields:
            ((set, index), list of (text, reason), or an error as text), as they are complete.
        """
        from paddlemix.models.blocks.many import answer_many

        waiting = {}

        def asked():
            for key, record in questions:
                try:
                    if isinstance(record, UserError):
                        raise record
                    prompts = self.prompts(key, record)
                except UserError as error:
                    waiting[key] = {}
                    yield (key, 0), error
                    continue
                waiting[key] = dict.fromkeys(range(len(prompts)))
                for number, (ids, pictures) in enumerate(prompts):
                    yield (key, number), ids, pictures, key[1] * self.args.samples + number + 1

        most = self.args.max_num_seqs
        for ended in answer_many(self.model, self.tokenizer, asked(), self.config, self.template, most):
            for answer in ended:
                key, number = answer.key
                if key not in waiting:
                    continue  # another of its answers failed
                if answer.error is not None:
                    del waiting[key]
                    self._heads.pop(key, None)
                    yield key, str(answer.error)
                    continue
                waiting[key][number] = self._text(key, answer), answer.reason
                if None not in waiting[key].values():
                    self._heads.pop(key, None)
                    yield key, list(waiting.pop(key).values())


def first_half(text):
    """The first half of a text, to the end of a word where it has one there.

    Raises:
        DataError: it is too short to have one.
    """
    half = len(text) // 2
    blank = text.rfind(" ", 1, half + 1)
    if half < 1:
        raise DataError("has an answer of one character, which has no half to go on from")
    return text[: blank if blank > 0 else half]


def make_parser():
    """The command's flags."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("meta_path", help="meta file of questions with right answers, as for fine-tuning")
    add("output_dir", help="where pairs and answers go")
    add("--model_name_or_path", default=str(DEMO_MODEL), help="a checkpoint, or a name of one (default: the demo model)")
    add("--method", default="sample", choices=["sample", "continue"], help="where answers come from (default: sample)")
    add("--samples", type=positive, default=None, help="answers to a question (default: 32; of --method continue 1)")
    add("--temperature", type=float, default=1.0, help="of sampling; 0 is greedy (default: 1)")
    add("--top_p", type=float, default=1.0, help="of sampling (default: 1)")
    add("--max_new_tokens", type=positive, default=1024, help="longest answer; longer ones are left out (default: 1024)")
    add("--instruction", default="", help="text below each question, such as how to reason")
    add("--judge", metavar="URL", help="let a model behind an OpenAI-compatible address say what is right; key: OPENAI_API_KEY")
    add("--judge_model", default="", help="its name there")
    add("--pairs_per_question", type=positive, default=4, help="at most (default: 4)")
    add("--max_num", type=positive, default=None, help="most tiles of a picture (default: the checkpoint's own)")
    add("--num_segments", type=positive, default=8, help="frames of a clip (default: 8)")
    add("--max_num_seqs", type=positive, default=32, help="answers made at once (default: 32)")
    add("--allowed_media_domains", nargs="+", default=[], help="hosts that pictures are fetched from (default: none)")
    add("--seed", type=int, default=0, help="(default: 0)")
    add("--device", default="auto", help="auto, or a Paddle device (default: auto)")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"], help="(default: auto)")
    return parser


def settle(args):
    """Check the flags, and fill in what depends on others.

    Raises:
        ConfigError: they do not fit together.
    """
    if args.samples is None:
        args.samples = 32 if args.method == "sample" else 1
    if args.judge and args.method == "continue":
        raise ConfigError("--judge is for --method sample: what is continued is compared with nothing")
    if bool(args.judge) != bool(args.judge_model):
        raise ConfigError("--judge and --judge_model go together: an address, and the name of the model there")
    if args.method == "continue" and args.instruction:
        raise ConfigError("--instruction is for --method sample: half of an answer does not follow it")
    if not 0 <= args.temperature <= 10 or not 0 < args.top_p <= 1:
        raise ConfigError("--temperature must be from 0 to 10, and --top_p above 0 and at most 1")


def check_settings(args, sources):
    """Note in ``build.json`` what answers are made with.

    Raises:
        DataError: answers that are there were made with something else.
    """
    from paddlemix.checkpoints.files import model_digest
    from paddlemix.checkpoints.hub import resolve

    names = "method samples temperature top_p max_new_tokens instruction max_num num_segments seed dtype".split()
    settings = {name: getattr(args, name) for name in names}
    settings["model"] = model_digest(resolve(args.model_name_or_path))
    settings["data"] = {source.name: json.loads(json.dumps(source.stamp())) for source in sources}
    path, answers = Path(args.output_dir, "build.json"), Path(args.output_dir, "answers.jsonl")
    try:
        os.makedirs(args.output_dir, exist_ok=True)
        if not answers.exists() or not answers.stat().st_size:
            write_whole(path, json.dumps(settings, ensure_ascii=False, indent=1) + "\n")
    except OSError as error:
        raise DataError(f"{args.output_dir} cannot be written ({error.strerror}): use another folder") from None
    before = read_json(path, DataError, absent="use another folder")
    for name, value in settings.items():
        if before.get(name) != value:
            raise DataError(f"{answers} was made with other settings ({name}): use another folder")


def sample(args, sources, lines):
    """Ask what is not answered yet."""
    from tqdm import tqdm

    def left():
        for source in sources:
            for index in range(source.num_records):
                if (source.name, index) in lines.rows:
                    continue
                try:
                    yield (source.name, index), source.read(index)
                except UserError as error:
                    yield (source.name, index), error

    total = sum(source.num_records for source in sources)
    if len(lines.rows) >= total:
        return
    asker = Asker(args)
    quiet = not sys.stderr.isatty()
    with tqdm(total=total, initial=len(lines.rows), unit="question", mininterval=10 if quiet else 0.5, file=sys.stderr) as bar:
        for (name, index), found in asker.answers(left()):
            row = {"set": name, "index": index}
            if isinstance(found, str):
                lines.add({**row, "error": found})
            else:
                lines.add({**row, "answers": [{"text": text, "reason": reason} for text, reason in found]})
            bar.update()


def judge(args, sources, lines, verdicts):
    """Let the judge look at what it has not seen yet: each text of a question once."""
    by_name = {source.name: source for source in sources}

    def look(key):
        question = Question(by_name[key[0]].read(key[1]))
        texts = {answer["text"] for answer in lines.rows[key]["answers"] if answer["reason"] != "length"}
        return key, {
            text: verdict(args.judge, args.judge_model, question.asked[-1], question.truth, text) for text in sorted(texts)
        }

    known = {key for key, row in verdicts.rows.items() if row.get("judge") == args.judge_model}
    keys = [key for key, row in lines.rows.items() if "answers" in row and key not in known]
    with ThreadPoolExecutor(_JUDGED_AT_ONCE) as pool:
        try:
            for (name, index), found in pool.map(look, keys):
                verdicts.add({"set": name, "index": index, "judge": args.judge_model, "verdicts": found})
        except DataError:
            pool.shutdown(cancel_futures=True)
            raise


def pairs_of(args, key, record, row, verdicts):
    """The (chosen, rejected) pairs of a question's answers."""
    truth = Question(record).truth
    texts = [answer["text"] for answer in row["answers"] if answer["reason"] != "length" and answer["text"].strip()]
    if args.method == "continue":
        right, wrong = [truth], [text for text in texts if not is_right(truth, text)]
    elif args.judge:
        said = verdicts.rows[key]["verdicts"]
        right, wrong = ([text for text in texts if said.get(text) is wanted] for wanted in (True, False))
    else:
        right, wrong = ([text for text in texts if is_right(truth, text) is wanted] for wanted in (True, False))
    return pair(right, wrong, args.pairs_per_question, [args.seed, *key])


def pair_row(source, index, number, record, instruction, chosen, rejected):
    """A row of the file of pairs: in MMPR's form where that can say it, else as messages."""
    question = Question(record).with_instruction(instruction)
    row = {"id": f"{source.line(index)}-{number}"}
    images = [image.url if isinstance(image, Remote) else _relative(image, source.root) for image in record.images]
    if len(question.asked) == 1 and question.system is None and not record.video:
        return {**row, "image": images or None, "question": question.asked[0], "chosen": chosen, "rejected": rejected}
    messages = [] if question.system is None else [{"role": "system", "content": question.system}]
    for asked, said in zip(question.asked, [*question.said, chosen]):
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    row |= {"messages": messages, "rejected_response": rejected}
    if record.video:
        clip = {"clip": list(record.clip)} if record.clip else {}
        return {**row, "videos": [_relative(record.video, source.root)], **clip}
    return {**row, "images": images} if images else row


def _relative(path, root):
    return path.removeprefix(os.path.join(root, ""))


def write_pairs(args, sources, lines, verdicts):
    """Write the files of pairs and their meta file; returns counts by what became of questions.

    Raises:
        DataError: there is no pair.
    """
    folder, meta, counts = Path(args.output_dir), {}, dict.fromkeys(("pairs", "without a pair", "not usable"), 0)
    for number, source in enumerate(sources):
        path, before = folder / f"pairs-{number:03d}.jsonl", counts["pairs"]
        unfinished = folder / f".{path.name}.tmp"
        with open(unfinished, "w", encoding="utf-8") as file:
            for index in range(source.num_records):
                key = source.name, index
                row = lines.rows.get(key)
                if row is None or "answers" not in row:
                    counts["not usable"] += 1
                    continue
                record = source.read(index)
                found = pairs_of(args, key, record, row, verdicts)
                counts["without a pair"] += not found
                for place, (chosen, rejected) in enumerate(found):
                    line = pair_row(source, index, place, record, args.instruction, chosen, rejected)
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
                counts["pairs"] += len(found)
        os.replace(unfinished, path)
        if counts["pairs"] > before:
            entry = {"root": source.root and os.path.abspath(source.root), "annotation": str(path.resolve()), "repeat_time": 1}
            entry |= {} if source.max_dynamic_patch is None else {"max_dynamic_patch": source.max_dynamic_patch}
            meta[source.name] = {**entry, "data_augment": source.data_augment}
    if not meta:
        raise DataError(
            f"no question has both right and wrong answers ({counts['without a pair']} without, {counts['not usable']} not "
            "usable): ask harder ones, raise --samples or --temperature, or name a --judge"
        )
    write_whole(folder / "meta.json", json.dumps(meta, ensure_ascii=False, indent=2) + "\n")
    return counts


@command_main
def main(argv=None):
    """Parse the command line and build."""
    args = make_parser().parse_args(argv)
    settle(args)
    sources = read_meta(args.meta_path, domains=args.allowed_media_domains)
    shards = next((source for source in sources if str(source.annotation).endswith(".tar")), None)
    if shards is not None:
        raise DataError(f"data set '{shards.name}' is in tar shards: unpack them, since pairs name their pictures' files")
    check_settings(args, sources)
    folder, verdicts = Path(args.output_dir), None
    lines = Lines(folder / "answers.jsonl")
    try:
        sample(args, sources, lines)
        if args.judge:
            verdicts = Lines(folder / "verdicts.jsonl")
            judge(args, sources, lines, verdicts)
        counts = write_pairs(args, sources, lines, verdicts)
    finally:
        lines.close()
        if verdicts is not None:
            verdicts.close()
    by_name = {source.name: source for source in sources}
    for (name, index), row in lines.rows.items():
        if "error" in row:
            print(f"{by_name[name].place(index)}: {row['error']}", file=sys.stderr)
    told = ", ".join(f"{count} {name}" for name, count in counts.items())
    print(f"{len(lines.rows)} questions: {told}. Look at them with: paddlemix check-data {folder / 'meta.json'} --pairs")


if __name__ == "__main__":
    main()
