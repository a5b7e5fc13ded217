"""What an app frozen by PyInstaller needs of colm-edge that its imports do not show."""  # noqa: N999

from pathlib import Path

from PyInstaller.utils.hooks import (
    collect_data_files,
    collect_dynamic_libs,
    collect_submodules,
    copy_metadata,
    get_package_paths,
)

# The shipped pair and models.txt; the metadata has the version.
datas = collect_data_files("colm_edge") + copy_metadata("colm-edge")
# llama-cpp-python opens its libraries by name, in a folder beside its code.
binaries = collect_dynamic_libs("llama_cpp")
# Built for every kind of CPU, its variants lie beside the package.
variants = Path(get_package_paths("llama_cpp")[0]).glob("bin/*ggml-cpu*")
binaries += [(str(library), "bin") for library in variants]
# Both are imported by name: the extension, and what `colm_edge.load` and the like stand for.
hiddenimports = [
    "_colm_edge_native",
    *collect_submodules("colm_edge", filter=lambda name: "_pyinstaller" not in name),
]
# Training a switch needs scipy, and scipy takes PyTorch along where that is installed: gigabytes
# that an app which only answers does without.
excludedimports = ["scipy"]
