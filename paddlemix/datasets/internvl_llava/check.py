"""Check LLaVA's training data before hours are spent on it.

  python -m paddlemix.datasets.internvl_llava.check --data_path records.json --image_folder pictures

reads every record as training does, without a model: turns, marks, and whether each picture opens. Prints what cannot be
used, and exits with 1 if there is any. What is likely a mistake, such as records that repeat, answers that are all equal, or
boxes in thousandths beside others in fractions, is a warning with its count and three examples a data set.
"""

import argparse

from paddlemix.commands import Parser
from paddlemix.datasets.doubts import look_at, sentences, summarize
from paddlemix.errors import UserError, command_main
from paddlemix.models.internvl_llava.encoding import check_record
from paddlemix.processors.image import open_image

from . import read_sources


def look(source, index, version="v1", pictures=True):
    """Read a record as training does: ``(its doubts or None, why it cannot be used or None)``.

    Args:
        source: a :class:`~paddlemix.datasets.records.Source`.
        index: of the record in it.
        version: how text is to be written, see :func:`~paddlemix.models.internvl_llava.encoding.encode_record`.
        pictures: whether they are opened.
    """
    found = None
    try:
        record = source.read(index)
        check_record({"conversations": record.conversations, "image": record.images}, version)
        found = look_at(record, bare=True)  # what is known if a picture cannot be opened
        sizes = [open_image(path).size for path in record.images] if pictures else ()
        return look_at(record, sizes, bare=True), None
    except UserError as error:
        return found, str(error)


def problems(sources, version="v1", pictures=True):
    """Yield ``(place, reason)`` for each record that cannot be used; arguments as for :func:`look`."""
    for source in sources:
        for index in range(source.num_records):
            _, reason = look(source, index, version, pictures)
            if reason is not None:
                yield source.place(index), reason


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
    bad = 0
    warnings = []
    for source in sources:
        found = []
        for index in range(source.num_records):
            doubts, reason = look(source, index, args.version)
            found.append(doubts)
            bad += reason is not None
            if reason is not None and bad <= args.max_problems:
                print(f"{source.place(index)}: {reason}")
        # LLaVA's own data have their boxes in fractions of the sides.
        told = summarize(found, source.line, fractions=True)
        warnings += sentences(source.name, told, source.annotation)
    for warning in warnings:
        print(warning)
    print(f"{bad} of {sum(source.num_records for source in sources)} records cannot be used")
    if bad:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
