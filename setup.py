"Reads settings.ini, where all of the project's facts live, and puts the job notebooks and SLURM's job files into the wheel."
import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
ini = ConfigParser(delimiters=["="], interpolation=None)
ini.read(HERE/"settings.ini", encoding="utf-8")
cfg = ini["DEFAULT"]
lines = lambda key: [o.strip() for o in cfg.get(key, "").splitlines() if o.strip()]
STATUS = {"2": "Pre-Alpha", "3": "Alpha", "4": "Beta", "5": "Production/Stable"}


class BuildWithJobs(build_py):
    "The wheel carries `nbs/jobs/*.ipynb` as `causal_meta/jobs/*.ipynb`, and `slurm/` as `causal_meta/jobs/slurm/`; an editable install reads them in place."
    def run(self):
        super().run()
        if self.editable_mode: return
        to = Path(self.build_lib)/cfg["lib_path"]/"jobs"
        (to/"slurm").mkdir(parents=True, exist_ok=True)
        for nb in sorted((HERE/cfg["nbs_path"]/"jobs").glob("*.ipynb")): shutil.copy(nb, to/nb.name)
        for file in (*sorted((HERE/"slurm").glob("*.sbatch")), HERE/"slurm"/"job.sh", HERE/"slurm"/"site.env.example"): shutil.copy(file, to/"slurm"/file.name)


setup(
    version=cfg["version"], description=cfg["description"], author=cfg["author"], author_email=cfg["author_email"],
    long_description=(HERE/"README.md").read_text(encoding="utf-8"), long_description_content_type="text/markdown",
    license="Apache-2.0", keywords=cfg["keywords"].split(), url=cfg["git_url"],
    classifiers=[f"Development Status :: {cfg['status']} - {STATUS[cfg['status']]}",
                 f"Intended Audience :: {cfg['audience']}", f"Natural Language :: {cfg['language']}",
                 f"Programming Language :: Python :: {cfg['min_python']}"],
    packages=find_packages(include=[cfg["lib_path"], cfg["lib_path"] + ".*"]),
    package_data={cfg["lib_path"]: ["configs/*.yaml", "frozen/*.json", "schemas/*.json", "pretrained/*.safetensors", "pretrained/*.json"]},
    install_requires=lines("requirements"),
    extras_require={k.removesuffix("_requirements"): lines(k) for k in cfg if k.endswith("_requirements")},
    # the second: where nbdev, in this project and in others, looks up the pages that names link to
    entry_points={"console_scripts": lines("console_scripts"), "nbdev": [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"],
                  "papermill.engine": lines("papermill_engines")},
    cmdclass={"build_py": BuildWithJobs},
)
