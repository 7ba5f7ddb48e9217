# The demo in a container:
#     docker build --tag upvits-deploy .
#     docker run --rm --volume "$PWD/runs:/runs" upvits-deploy
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

RUN useradd --create-home upvits && mkdir /runs && chown upvits /runs
USER upvits
WORKDIR /
VOLUME /runs
ENTRYPOINT ["upvits-deploy"]
CMD ["build", "--model", "pvtv2_b0", "--ratio", "0.5"]
