#!/bin/sh
# Serves the packaged Qwen2.5-Coder 0.5B and SmolLM2 135M as a provider would: by OpenAI's API, on port 8765.
#
#     make architectures && pip install "transformers[serving]" && experiments/blackbox/serve.sh
#
# The server names a model by its folder; links give them short names, relative to the folder in which it is started.
set -eu
folder=$(mktemp -d)
for model in qwen=qwen2.5-coder-0.5b-instruct smollm2=smollm2-135m-instruct; do
    ln -s "$(python -c "from semcons_ray.modeling.packaged import resolve_model as r; print(r('packaged:${model#*=}'))")" \
        "$folder/${model%%=*}"
done
cd "$folder"
HF_HUB_OFFLINE=1 exec transformers serve --host 127.0.0.1 --port 8765
