# megatron_vlm on NVIDIA's PyTorch image. The image's torch, transformer-engine, flash-attention and apex are built for
# each other and stay as they are: nothing here installs another version of anything that the image has.
#   docker build -t megatron-vlm .
#   docker run --gpus all --ipc=host -v "$PWD:/workspace/run" -w /workspace/run megatron-vlm train train.yaml
ARG BASE_IMAGE=nvcr.io/nvidia/pytorch:25.12-py3
FROM ${BASE_IMAGE}

WORKDIR /opt/megatron_vlm

# What changes rarely comes first. The image's own constraint file (PIP_CONSTRAINT) pins only what NVIDIA listed; the
# merged one pins everything that is installed, and takes the tested versions for what is not.
COPY constraints.txt tools/image_constraints.py /tmp/build/
RUN python /tmp/build/image_constraints.py /tmp/build/constraints.txt > /tmp/build/merged.txt \
    && export PIP_CONSTRAINT=/tmp/build/merged.txt \
    && python -m pip install --no-cache-dir --no-deps megatron-core \
    && python -m pip install --no-cache-dir \
        fsspec matplotlib numpy pillow psutil pyarrow pyyaml safetensors scipy sentencepiece simplejpeg tensorboard tokenizers tqdm \
        transformers

COPY . .
RUN python -m pip install --no-cache-dir --no-deps --no-build-isolation --editable . \
    && python -c "import torch; assert torch.version.cuda, 'the CUDA build of torch was replaced'" \
    && python -c "from importlib.util import find_spec; assert find_spec('apex') and find_spec('transformer_engine')" \
    && megatron-vlm --version

ENTRYPOINT ["megatron-vlm"]
CMD ["--help"]
