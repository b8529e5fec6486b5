"""Where the data sets come from: who publishes them, under which licence, how large they are.

``docs/evaluation.md`` has this as a table. Sizes are rounded: they tell how much room to make.
"""

from typing import NamedTuple


class Source(NamedTuple):
    """A publisher's page; the licence, as far as it states one; questions of the tasks; what pictures take on disk, roughly."""

    url: str
    licence: str
    questions: str
    disk: str


_COCO = "annotations CC BY 4.0, pictures by Flickr's terms"
_STATED = "none stated; for research"
_RRC = "for research, after registration"

SOURCES = {
    "coco": Source("https://cocodataset.org", _COCO, "5,000", "6 GB (val2014)"),
    "flickr30k": Source("https://shannon.cs.illinois.edu/DenotationGraph", "research and education only", "1,000", "4 GB"),
    "nocaps": Source("https://nocaps.org", "CC BY 2.0 (Open Images)", "4,500", "2 GB"),
    "okvqa": Source("https://okvqa.allenai.org", _COCO, "5,046", "6 GB (COCO val2014)"),
    "textvqa": Source("https://textvqa.org", "CC BY 4.0", "5,000", "7 GB"),
    "vizwiz": Source("https://vizwiz.org/tasks-and-datasets/vqa", "CC BY 4.0", "4,319; test 8,000", "10 GB"),
    "vqav2": Source("https://visualqa.org", "CC BY 4.0", "214,354; testdev 107,394", "6 GB (val2014), 12 GB (test2015)"),
    "gqa": Source("https://cs.stanford.edu/people/dorarad/gqa", "CC BY 4.0", "12,578", "20 GB"),
    "docvqa": Source(
        "https://www.docvqa.org",
        _RRC,
        "DocVQA 5,349 and 5,188; InfoVQA 2,801 and 3,288; MP-DocVQA 5,187 and 5,019",
        "10 GB and more",
    ),
    "chartqa": Source("https://github.com/vis-nlp/ChartQA", "GPL-3.0", "1,250 and 1,250", "1 GB"),
    "ocrvqa": Source("https://ocr-vqa.github.io", "for research; covers belong to their publishers", "about 100,000", "6 GB"),
    "ai2d": Source("https://prior.allenai.org/projects/diagram-understanding", "CC BY-SA 4.0", "3,088", "1 GB"),
    "refer": Source(
        "https://github.com/lichengunc/refer",
        "Apache-2.0, pictures of COCO 2014",
        "10,834, 5,657, 5,095; + 10,758, 5,726, 4,889; g 4,896, 9,602",
        "13 GB (COCO train2014)",
    ),
    "mme": Source(
        "https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models", "research only, on request", "2,374", "1 GB"
    ),
    "pope": Source("https://github.com/RUCAIBox/POPE", "MIT", "8,910 to 9,000", "6 GB (COCO val2014)"),
    "mmbench": Source("https://github.com/open-compass/MMBench", "Apache-2.0", "dev 4,329; test 6,666; CCBench 2,040", "1 GB"),
    "scienceqa": Source("https://scienceqa.github.io", "CC BY-NC-SA 4.0", "2,017", "1 GB"),
    "m3cot": Source("https://github.com/LightChen233/M3CoT", "CC BY-NC-SA 4.0", "2,318", "1 GB"),
    "mmvp": Source("https://huggingface.co/datasets/MMVP/MMVP", "MIT", "300", "20 MB"),
    "seed": Source("https://huggingface.co/datasets/AILab-CVC/SEED-Bench", "CC BY-NC 4.0", "14,232 of pictures", "27 GB"),
    "mmmu": Source("https://huggingface.co/datasets/MMMU/MMMU", "Apache-2.0", "150; 900; 10,500", "4 GB"),
    "mmmu-pro": Source("https://huggingface.co/datasets/MMMU/MMMU_Pro", "Apache-2.0", "1,730 of each setting", "3 GB"),
    "mathvista": Source("https://huggingface.co/datasets/AI4Math/MathVista", "CC BY-SA 4.0", "1,000; 5,141", "1 GB"),
    "mvbench": Source("https://huggingface.co/datasets/OpenGVLab/MVBench", "MIT; clips by their own", "4,000", "17 GB"),
    "mmvet": Source("https://github.com/yuweihao/MM-Vet", "Apache-2.0 (code), CC BY-NC 4.0", "218; v2 517", "70 MB; v2 400 MB"),
    "llava-bench": Source("https://huggingface.co/datasets/liuhaotian/llava-bench-in-the-wild", _STATED, "60", "30 MB"),
    "mmhal": Source("https://huggingface.co/datasets/Shengcao1006/MMHal-Bench", "Apache-2.0", "96", "60 MB"),
    "tiny_lvlm": Source("https://github.com/OpenGVLab/Multi-Modality-Arena", _STATED, "2,100", "1 GB"),
    "mmiu": Source("https://huggingface.co/datasets/FanqingM/MMIU-Benchmark", "CC BY 4.0", "11,698", "20 GB"),
    "mirb": Source("https://huggingface.co/datasets/VLLMs/MIRB", "MIT; pictures by their own", "925", "2 GB"),
    "mantis": Source("https://huggingface.co/datasets/TIGER-Lab/Mantis-Eval", "Apache-2.0", "217", "500 MB"),
    "adaptation": Source(
        "https://huggingface.co/datasets/OpenGVLab/InternVL-Domain-Adaptation-Data",
        "MIT (annotations); pictures by their own",
        "RSVQA 10,004 and more; DIOR-RSVG 7,500; DriveLM 15,480",
        "by the set, up to 30 GB",
    ),
    "llava": Source("https://github.com/haotian-liu/LLaVA", "Apache-2.0; data by each set's own", "each set's", "each set's"),
}
