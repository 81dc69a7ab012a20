# An image that runs every command:
#
#   docker build -t offline-meal-v2 .
#
# torch and DALI bring their CUDA libraries, so the base needs none. The machine needs
# NVIDIA's driver and container toolkit.
FROM python:3.11-slim

# torch.compile (store.compile and train.compile) calls a C compiler.
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

# A home for what is cached, whichever user runs the container.
ENV HOME=/home/any
RUN mkdir -m 1777 /home/any

# The packages, some 6 GB, in a layer that lasts until setup.cfg changes.
WORKDIR /opt/offline-meal-v2
ARG EXTRAS=parquet,remote,export,ray
COPY setup.cfg pyproject.toml LICENSE ./
RUN touch README.md cli.py && pip install --no-cache-dir ".[$EXTRAS]"

COPY . .
# What was built above is newer than the code, and would be taken for it.
RUN rm -rf build *.egg-info && pip install --no-cache-dir --no-deps --force-reinstall .

WORKDIR /work
ENV PYTHONUNBUFFERED=1
ENTRYPOINT ["offline-meal-v2"]
CMD ["--help"]
