"""Answer the questions of LLaVA's evaluation sets, and write the answers in its JSON lines.

  python paddlemix/examples/internvl_llava/answer.py --model-path CHECKPOINT --task llava-gqa
      reads playground/data/eval/gqa/... and writes results/llava-gqa/answers.jsonl

The original's ways of its four loops, with --num-chunks and --chunk-idx for one of several processes.
"""

import argparse
import os

from paddlemix.commands import Parser
from paddlemix.errors import command_main


@command_main
def main(argv=None):
    """Parse the command line and answer."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", required=True, help="a checkpoint directory, or a name")
    parser.add_argument("--model-base", help="the language model of a checkpoint that is a projector or adapters alone")
    parser.add_argument("--vision-tower", help="the vision tower, instead of the one that the checkpoint has or names")
    parser.add_argument("--task", required=True, help="llava-gqa, llava-vqav2, llava-vizwiz, llava-pope, llava-mme, ...")
    parser.add_argument("--data-root", default="playground/data/eval", help="folder of the sets (default: %(default)s)")
    parser.add_argument("--answers-file", help="where to write (default: results/TASK/answers.jsonl)")
    parser.add_argument("--conv-mode", default="vicuna_v1", help="conversation template (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest tokens (default: %(default)s)")
    parser.add_argument("--num-beams", "--num_beams", type=int, default=1, help="beams of the search (default: 1)")
    parser.add_argument("--num-chunks", type=int, default=1, help="parts that the set is cut into (default: 1)")
    parser.add_argument("--chunk-idx", type=int, default=0, help="the part to answer, from 0 (default: 0)")
    parser.add_argument("--all-rounds", action="store_true", help="MMBench: once for each rotation of the choices")
    parser.add_argument("--lang", default="en", choices=["en", "cn"], help="language of the instruction about choices")
    parser.add_argument("--limit", type=int, help="so many questions at most")
    parser.add_argument("--device", default="auto", help="auto, cpu, gpu, npu or another Paddle device (default: auto)")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"], help="(default: auto)")
    args = parser.parse_args(argv)

    from paddlemix.evaluation.llava import SETS, answer, read_questions, write_answers

    kind = SETS[args.task].kind if args.task in SETS else None
    options = {"lang": args.lang} if kind in ("science", "mmbench") else {}
    options |= {"all_rounds": True} if kind == "mmbench" and args.all_rounds else {}
    questions = read_questions(args.task, args.data_root, args.num_chunks, args.chunk_idx, **options)[: args.limit]

    from tqdm import tqdm

    from paddlemix import device
    from paddlemix.models.internvl_llava import LlavaForCausalLM, load_tokenizer

    device.set_device(args.device)
    model = LlavaForCausalLM.from_pretrained(args.model_path, args.model_base, args.vision_tower, dtype=args.dtype)
    sampling = {"num_beams": args.num_beams} if args.num_beams > 1 else {}
    sampling |= {"do_sample": True, "temperature": args.temperature} if args.temperature else {}
    name = os.path.basename(os.path.normpath(args.model_path))
    lines = answer(model, load_tokenizer(args.model_path, args.model_base), tqdm(questions), args.conv_mode, name, **sampling)
    path = args.answers_file or os.path.join("results", args.task, "answers.jsonl")
    print(f"{write_answers(path, lines)} answers written to {path}")


if __name__ == "__main__":
    main()
