"""Write the passwords of the compose file and of the Kubernetes manifests, once.

They are random, readable for their owner only, and not for git. A file that exists is left
alone: the services that run know its passwords. Delete it to get new ones.
"""

import os
import secrets
import sys
from contextlib import suppress
from pathlib import Path

FOLDER = Path(__file__).parent / "kubernetes" / "base" / "secrets"
FILES = {
    # KubeRay looks for Ray's token under the first name, Ray itself under the second.
    "ray.env": "auth_token={0}\nRAY_AUTH_TOKEN={0}\n",
    "postgres.env": "POSTGRES_PASSWORD={0}\n",
    "s3.env": "AWS_ACCESS_KEY_ID={0}\nAWS_SECRET_ACCESS_KEY={1}\n",
}


def main() -> int:
    """Write the files that do not exist, and say where they are."""
    FOLDER.mkdir(mode=0o700, exist_ok=True)
    for name, lines in FILES.items():
        with suppress(FileExistsError):
            descriptor = os.open(FOLDER / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
            with os.fdopen(descriptor, "w") as file:
                file.write(lines.format(secrets.token_hex(20), secrets.token_hex(20)))
    sys.stdout.write(f"The passwords are in {FOLDER}.\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
