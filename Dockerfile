# tuner with CUDA: docker build -t tuner . (docs/install.md says how to run it). torch's wheels bring the CUDA libraries;
# the host brings the driver. A compiler is there for torch.compile and Triton's kernels.
FROM python:3.12-slim-bookworm

RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ git \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/tuner
COPY LICENSE README.md constraints.txt pyproject.toml ./
COPY core core
COPY plugins plugins
RUN python -m pip install --no-cache-dir -c constraints.txt '.[cuda]'

# Not root: what it writes belongs to uid 1000 (docker run --user says otherwise).
RUN useradd --create-home --uid 1000 tuner \
    && mkdir -p /work /cache \
    && chown tuner:tuner /work /cache
USER tuner
ENV HF_HOME=/cache/huggingface
WORKDIR /work
VOLUME ["/work", "/cache"]

ENTRYPOINT ["tuner"]
CMD ["--help"]
