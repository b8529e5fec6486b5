#!/bin/sh
# Zero-shot classification of twenty-one data sets with InternVL-G, each a folder of class folders. Variables and arguments: see run.sh.
set -eu
MODE=InternVL-G

. "$(dirname "$0")/run.sh"

for set in birdsnap cifar10 cifar100 food101 sun397 cars fgvc_aircraft dtd pets caltech101 mnist stl10 eurosat gtsrb country211 \
    pcam renderedsst2 fer2013 voc2007 flowers resisc45; do
    classify "$set" "$set" en "$set"
done
