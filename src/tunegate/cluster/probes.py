"""A try of what the nodes of a cluster will need: the image in its registry."""

from __future__ import annotations

import base64
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from tunegate.errors import TunegateError
from tunegate.finding import Finding

_TIMEOUT = (5.0, 15.0)


@dataclass(frozen=True)
class ImageReference:
    """A container image, taken apart."""

    registry: str
    name: str
    tag: str | None
    digest: str | None

    @classmethod
    def parse(cls, image: str) -> ImageReference:
        """Take a reference apart as Docker does: no registry means docker.io, no slash `library/`.

        Raises:
            TunegateError: It is no image reference.
        """
        name = r"([A-Za-z0-9.-]+(:\d+)?/)?[a-z0-9]+([._/-]+[a-z0-9]+)*"
        pattern = rf"^(?P<name>{name})(:(?P<tag>[\w][\w.-]{{0,127}}))?(@(?P<digest>sha256:[0-9a-f]{{64}}))?$"
        match = re.match(pattern, image)
        if match is None:
            raise TunegateError(
                "this is no image reference", key="image", value=image, fix="registry/name:tag@sha256:<64 digits>"
            )
        first, _, rest = match["name"].partition("/")
        if rest and ("." in first or ":" in first or first == "localhost"):
            registry, name = first, rest
        else:
            registry, name = "registry-1.docker.io", match["name"] if rest else f"library/{match['name']}"
        return cls(registry=registry, name=name, tag=match["tag"], digest=match["digest"])


_MANIFEST_TYPES = ", ".join(
    [
        "application/vnd.oci.image.index.v1+json",
        "application/vnd.oci.image.manifest.v1+json",
        "application/vnd.docker.distribution.manifest.list.v2+json",
        "application/vnd.docker.distribution.manifest.v2+json",
    ]
)


def probe_image(image: str) -> Finding:
    """Ask the registry for the image's manifest, with the credentials of `docker login` where there are any."""
    check = "image"
    try:
        reference = ImageReference.parse(image)
    except TunegateError as error:
        return Finding(check, "failure", str(error.reason) + f": {image}", error.fix or "")
    import requests  # type: ignore[import-untyped]

    local = reference.registry.split(":")[0] in {"localhost", "127.0.0.1"}
    wanted = reference.digest or reference.tag or "latest"
    url = f"{'http' if local else 'https'}://{reference.registry}/v2/{reference.name}/manifests/{wanted}"
    headers = {"Accept": _MANIFEST_TYPES}
    try:
        answer = requests.head(url, headers=headers, timeout=_TIMEOUT)
        if answer.status_code == 401:
            authorization = _registry_login(answer.headers.get("WWW-Authenticate", ""), reference)
            answer = requests.head(url, headers={**headers, "Authorization": authorization}, timeout=_TIMEOUT)
    except requests.RequestException:
        return Finding(
            check,
            "warning",
            f"{image}: the registry {reference.registry} cannot be reached from here",
            "if nodes cannot reach it either, set resources.image to a mirror",
        )
    if answer.status_code in {401, 403}:
        return Finding(
            check,
            "warning",
            f"{image}: the registry does not let us look",
            f"docker login {reference.registry}; for the nodes name a Secret in resources.image_pull_secrets",
        )
    if answer.status_code == 404:
        return Finding(
            check, "failure", f"{image} is not in the registry", "set resources.image, or push the image there"
        )
    if not answer.ok:
        return Finding(check, "warning", f"{image}: the registry answered {answer.status_code}", "try again")
    digest = answer.headers.get("Docker-Content-Digest")
    if not reference.digest:
        base = image.rsplit(":", 1)[0] if reference.tag else image
        pin = f"resources.image: {base}@{digest}" if digest else "resources.image: name@sha256:…"
        return Finding(check, "warning", f"{image} is there, but a tag can move under a running pipeline", pin)
    return Finding(check, "ok", f"{image} is there")


def _registry_login(challenge: str, reference: ImageReference) -> str:
    """An Authorization header for a registry, by its challenge (Distribution spec, token authentication)."""
    import requests

    stored = _stored_credentials(reference.registry)
    if not challenge.lower().startswith("bearer "):
        return f"Basic {stored}" if stored else ""
    fields = dict(re.findall(r'(\w+)="([^"]*)"', challenge))
    answer = requests.get(
        fields.get("realm", ""),
        params={"service": fields.get("service", ""), "scope": f"repository:{reference.name}:pull"},
        headers={"Authorization": f"Basic {stored}"} if stored else {},
        timeout=_TIMEOUT,
    )
    content = answer.json() if answer.ok else {}
    return f"Bearer {content.get('token') or content.get('access_token') or ''}"


def _stored_credentials(registry: str) -> str | None:
    folder = Path(os.environ.get("DOCKER_CONFIG", "~/.docker")).expanduser()
    try:
        auths = json.loads((folder / "config.json").read_text()).get("auths", {})
    except (OSError, ValueError):
        return None
    keys = [registry, f"https://{registry}"]
    if registry == "registry-1.docker.io":
        keys.append("https://index.docker.io/v1/")
    for key in keys:
        entry = auths.get(key, {})
        if entry.get("auth"):
            return str(entry["auth"])
        if entry.get("username"):
            return base64.b64encode(f"{entry['username']}:{entry.get('password', '')}".encode()).decode()
    return None
