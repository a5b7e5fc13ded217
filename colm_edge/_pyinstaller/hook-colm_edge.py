"""Add to a frozen app what PyInstaller cannot find from colm-edge's imports."""  # noqa: N999

from pathlib import Path

from PyInstaller.utils.hooks import (
    collect_data_files,
    collect_dynamic_libs,
    collect_submodules,
    copy_metadata,
    get_package_paths,
)

# The demo pair and models.txt, and the metadata, which has the version.
datas = collect_data_files("colm_edge") + copy_metadata("colm-edge")
# llama-cpp-python opens its libraries by name, in a folder next to its code.
binaries = collect_dynamic_libs("llama_cpp")
# In a build for all kinds of CPU, the variants are next to the package.
variants = Path(get_package_paths("llama_cpp")[0]).glob("bin/*ggml-cpu*")
binaries += [(str(library), "bin") for library in variants]
# Imported by name: the C extension, and the modules behind `colm_edge.load` and other public names.
hiddenimports = [
    "_colm_edge_native",
    *collect_submodules("colm_edge", filter=lambda name: "_pyinstaller" not in name),
]
# Training a switch needs scipy, and scipy takes PyTorch along where that is installed: gigabytes
# that an app which only answers does without.
excludedimports = ["scipy"]
