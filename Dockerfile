# One image for CUDA, or for the CPU alone, which is smaller:
#
#     docker build -t onestage .
#     docker build -t onestage --build-arg TORCH_BACKEND=cpu .
#     docker run --rm --gpus all --shm-size 8g -v "$PWD/coco:/data:ro" -v "$PWD/output:/output" \
#         onestage ssd_mmdet/train.py --data=/data --output_dir=/output
#
# torch's wheels bring CUDA's libraries: the host needs NVIDIA's driver and container toolkit only.
# For --compile take a BASE with g++, such as python:3.11-bookworm.
ARG BASE=python:3.11-slim-bookworm
FROM ${BASE}

# "": the CUDA build that requirements.txt names; cpu, cu126, ...: uv's name of another build.
ARG TORCH_BACKEND=""
ENV PYTHONUNBUFFERED=1
WORKDIR /onestage

# The packages come first: they change less often than the code.
COPY requirements.txt ./
RUN pip install --no-cache-dir uv==0.13.9 \
    && uv pip install --system --no-cache ${TORCH_BACKEND:+"--torch-backend=${TORCH_BACKEND}"} \
        -r requirements.txt
COPY . .

ENTRYPOINT ["python3"]
CMD ["selfcheck.py"]
