# An image with the command offline-meal-v2. Build it in a checkout:
#   docker build --tag offline-meal-v2 .
# torch and DALI bring CUDA's libraries, so that a slim Python is base enough. A node
# needs NVIDIA's driver and container toolkit alone.
FROM python:3.11-slim

# torch.compile (store.compile and train.compile) calls a C compiler.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

# Extras of setup.cfg; ray, export and track can be added.
ARG EXTRAS=parquet,remote

WORKDIR /source

# Requirements come before the code, so that a change of the code downloads nothing
# again. An empty module stands in for the program.
COPY setup.cfg pyproject.toml README.md LICENSE ./
RUN --mount=type=cache,target=/root/.cache/pip \
    touch cli.py && pip install ".[${EXTRAS}]"

COPY cli.py ./
COPY cache ./cache
COPY configs ./configs
COPY pipeline ./pipeline
RUN rm -rf build *.egg-info && pip install --no-deps --no-cache-dir --force-reinstall .

# Nobody in particular: with --user any number may run it, since HOME is open to all.
RUN mkdir -p /home/meal /data && chmod 1777 /home/meal /data
ENV HOME=/home/meal \
    PYTHONUNBUFFERED=1
USER 1000:1000
WORKDIR /data

ENTRYPOINT ["offline-meal-v2"]
CMD ["--help"]
