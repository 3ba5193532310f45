#!/usr/bin/env bash
# The paper's three stages at 7B: alignment, tuning, bounds. See usage().
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'END'
Usage: launch/paper_7b.sh --models=DIR --data=DIR [--benchmarks=DIR]
         [--out=DIR] [--gpu | --tpu] [--dry-run] [FLAGS]

Makes .venv, installs the pinned dependencies (once), and then, in OUT (runs/7b):

  start             Vicuna and CLIP, with a random projector
  align/full        LLaVA's first stage: the projector learns on captions
  tune/voco         VoCo-LLaMA with one token
  tune/voco_causal  the upper bound; read under the VoCo mask the lower bound

Each benchmark is answered by all three, in float16 as in the original, and
tune/tables.md has the scores and the retention. Run again, it goes on where it
stopped. On several hosts run the commands that --dry-run prints, each on all.

  MODELS      vicuna-7b-v1.5/, clip-vit-large-patch14-336/: as on the Hugging
              Face hub (lmsys/..., openai/...)
  DATA        LLaVA-Pretrain/: blip_laion_cc_sbu_558k.json and images/;
              llava_v1_5_mix665k.json, and beside it coco/, gqa/, ocr_vqa/,
              textvqa/, vg/: as LLaVA's playground/data
  BENCHMARKS  one folder each, named as for --benchmark in README.md: gqa/, ...
  FLAGS       for all three calls of python -m vocojax.train
  --dry-run   print the commands, install and run nothing

PYTHON=/path/to/python3.11 chooses the Python that .venv is made with.
END
}

extra=cpu models='' data='' benchmarks='' out=runs/7b
flags=()
while (($#)); do
  case $1 in
    --help | -h) usage && exit ;;
    --gpu | --tpu) extra=${1#--} ;;
    --dry-run) dry_run=1 ;;
    --models=*) models=${1#*=} ;;
    --data=*) data=${1#*=} ;;
    --benchmarks=*) benchmarks=${1#*=} ;;
    --out=*) out=${1#*=} ;;
    *) flags+=("$1") ;;
  esac
  shift
done
[[ $models ]] || die "--models: missing; --help says what the folder holds"
[[ $data ]] || die "--data: missing; --help says what the folder holds"

llm=$models/vicuna-7b-v1.5 clip=$models/clip-vit-large-patch14-336
pairs=$data/LLaVA-Pretrain chats=$data/llava_v1_5_mix665k.json
for path in "$llm" "$clip" "$pairs/images" \
  "$pairs/blip_laion_cc_sbu_558k.json" "$chats" ${benchmarks:+"$benchmarks"}; do
  [[ -e $path ]] || die "$path: not there; --help says where to get it"
done
((dry_run)) || install "$extra"
program() { run .venv/bin/python -m "vocojax.$1" "${@:2}"; }

# train CONFIG FOLDER [FLAG...]: one stage, in a folder of OUT.
train() {
  program train --config="configs/$1.py" --workdir="$out/$2" "${@:3}" \
    "${flags[@]}"
}

[[ -d $out/start/checkpoints ]] ||
  program convert --llm="$llm" --vision="$clip" --out="$out/start"
train align align --config.init_from="$out/start" \
  --config.data.path="$pairs/blip_laion_cc_sbu_558k.json" \
  --config.data.image_folder="$pairs/images"
for compressor in voco voco_causal; do
  train voco_1tok tune --config.init_from="$out/align/full" \
    --config.model.compressor.name="$compressor" \
    --config.data.path="$chats" --config.data.image_folder="$data"
done
[[ $benchmarks ]] || exit 0
for folder in "$benchmarks"/*/; do
  for use in voco voco_causal 'voco_causal --compressor=voco'; do
    read -ra words <<<"$use"
    program evaluate --checkpoint="$out/tune/${words[0]}" "${words[@]:1}" \
      --benchmark="$(basename "$folder")" --data="${folder%/}" --float16
  done
done
program report "$out/tune"
