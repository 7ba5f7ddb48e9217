# The demo in a container:
#     docker build --tag upvits-deploy .
#     mkdir -p runs && docker run --rm --user "$(id -u):$(id -g)" --volume "$PWD/runs:/runs" upvits-deploy
# Other commands come after the name: docker run --rm upvits-deploy doctor
FROM python:3.12-slim

WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY upvits upvits
COPY calib_data calib_data
COPY toolchain toolchain
COPY detection detection
COPY deploy deploy
RUN pip install --no-cache-dir --constraint constraints.txt '.[tensorrt-rtx,openvino]'

# Any user may run it: results go to /runs, caches to /tmp.
RUN mkdir --mode=1777 /runs
USER nobody
ENV HOME=/tmp
WORKDIR /
ENTRYPOINT ["upvits-deploy"]
CMD ["build", "--model", "pvtv2_b0", "--ratio", "0.5"]
