# Conversions on CPUs:
#   docker build --tag dist-convert .
#   docker run --rm --user "$(id -u):$(id -g)" --volume /ckpts:/ckpts --volume /out:/out dist-convert \
#       convert /ckpts/llama /out/llama-hf --to huggingface --ranks 4
FROM python:3.12-slim

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 HF_HOME=/tmp/huggingface OMP_NUM_THREADS=1
RUN pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu
WORKDIR /opt/dist_convert
COPY . .
# hadolint ignore=DL3013
RUN pip install '.[tokenizers]'

ENTRYPOINT ["dist-convert"]
CMD ["--help"]
