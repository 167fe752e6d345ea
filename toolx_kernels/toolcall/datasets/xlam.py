"""Tools of xLAM-function-calling-60k."""

from collections.abc import Mapping

from toolx_kernels.errors import InputError, short
from toolx_kernels.toolcall.datasets.type_names import flat_schema


def flat_tool(tool: Mapping, place: str) -> dict:
    """Converts a tool whose ``parameters`` are flat: name -> ``{"type": a Python annotation, "description", "default"?,
    "required"?}``; ``flat_schema`` says which are required, and the tool itself may list them in ``required``, also in
    a text, separated by commas.

    Raises InputError, beginning with ``place``, for parameters of another form.
    """
    parameters = tool.get("parameters") or {}
    if not isinstance(parameters, Mapping) or not all(isinstance(spec, Mapping) for spec in parameters.values()):
        raise InputError(f"{place}: the parameters of tool {tool.get('name')!r} must map names to their descriptions.")
    required = tool.get("required")
    if isinstance(required, str):
        required = [name.strip() for name in required.split(",") if name.strip()]
        if not set(required) <= parameters.keys():
            raise InputError(
                f"{place}: field 'required' of tool {tool.get('name')!r} is {short(tool['required'])}: give a list of"
                " names of its parameters."
            )
    return {
        "name": tool.get("name"),
        "description": tool.get("description", ""),
        "parameters": flat_schema(parameters, required if isinstance(required, list) else None),
    }
