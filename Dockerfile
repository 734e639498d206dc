# docker build -t nodepass .
#
# The wheel is made inside, so that it fits the Python that runs it. PYTHON=python:3.13-alpine makes a smaller image.
ARG PYTHON=python:3.13-slim

FROM ${PYTHON} AS build
RUN if command -v apk >/dev/null; then apk add --no-cache gcc musl-dev linux-headers; \
    else apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev; fi
COPY . /source
RUN NODEPASS_NATIVE=1 pip wheel --no-cache-dir --wheel-dir /wheels /source

FROM ${PYTHON}
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    pip install --no-cache-dir --no-index --find-links /wheels nodepass
USER nobody
ENTRYPOINT ["nodepass"]
