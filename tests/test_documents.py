"""What the documents tell a reader to type exists."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import typer
from typer.main import get_command

from deploy.cli import app

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md")
