"""Check LLaVA's training data before hours are spent on it.

  python -m paddlemix.datasets.internvl_llava.check --data_path records.json --image_folder pictures

reads every record as training does, without a model: turns, marks, and whether each picture opens. Prints what cannot be
used, and exits with 1 if there is any.
"""

import argparse

from paddlemix.commands import Parser
from paddlemix.errors import UserError, command_main
from paddlemix.models.internvl_llava.encoding import check_record
from paddlemix.processors.image import open_image

from . import read_sources


def problems(sources, version="v1", pictures=True):
    """Yield ``(place, reason)`` for each record that cannot be used.

    Args:
        sources: of :func:`~paddlemix.datasets.internvl_llava.read_sources`.
        version: how text is to be written, see :func:`~paddlemix.models.internvl_llava.encoding.encode_record`.
        pictures: whether they are opened.
    """
    for source in sources:
        for index in range(source.num_records):
            try:
                record = source.read(index)
                check_record({"conversations": record.conversations, "image": record.images}, version)
                for path in record.images if pictures else ():
                    open_image(path)
            except UserError as error:
                yield source.place(index), str(error)


@command_main
def main(argv=None):
    """Parse the command line and check."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", help="JSON file of records: one list, or one record a line")
    parser.add_argument("--image_folder", default="", help="folder that the records' pictures are relative to")
    parser.add_argument("--meta_path", help="a meta file of several data sets, instead")
    parser.add_argument("--version", default="v1", help="how text is written: plain, v1 or a template's name (default: v1)")
    parser.add_argument("--max_problems", type=int, default=20, help="so many are printed (default: 20)")
    args = parser.parse_args(argv)
    if args.data_path is None and args.meta_path is None:
        parser.error("--data_path is missing")
    sources = read_sources(args.data_path, args.image_folder, args.meta_path)
    found = list(problems(sources, args.version))
    for place, reason in found[: args.max_problems]:
        print(f"{place}: {reason}")
    print(f"{len(found)} of {sum(source.num_records for source in sources)} records cannot be used")
    if found:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
