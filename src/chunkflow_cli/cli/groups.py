"""Define the help and options of the commands that have commands of their own: `config` and `recipes`."""

from __future__ import annotations

from typing import Annotated

import typer

from chunkflow_cli.cli.command import CONFIGURATION, Request, Result, command
from chunkflow_cli.cli.completion import complete_recipe
from chunkflow_cli.cli.mistakes import Commands

config_app = typer.Typer(cls=Commands, no_args_is_help=True)
recipes_app = typer.Typer(cls=Commands, no_args_is_help=True)

RecipeName = Annotated[
    str,
    typer.Argument(
        metavar="NAME", help="Name of a recipe, as `chunkflow recipes list` prints it.", autocompletion=complete_recipe
    ),
]


@config_app.callback()
def config() -> None:
    """Print the JSON schema of the configuration.

    An editor can use it to complete and check the keys of a recipe.

    [bold]Examples[/]
      chunkflow config schema
      chunkflow config schema > chunkflow.schema.json
      chunkflow config schema --json
    """


@command(config_app, "schema", without=(*CONFIGURATION, "config_dir"))
def schema(request: Request) -> Result:
    """Print the JSON schema of recipes.

    It has every key with its type, bounds, default and meaning. An editor with
    a YAML language server completes and checks the keys of a recipe whose first
    line is
    # yaml-language-server: $schema=chunkflow.schema.json

    [bold]Examples[/]
      chunkflow config schema
      chunkflow config schema > chunkflow.schema.json
      chunkflow config schema --json
    """
    import json

    from chunkflow_cli.config.json_schema import json_schema

    found = json_schema()
    if not request.json_output:
        print(json.dumps(found, indent=2))
    return found


@recipes_app.callback()
def recipes() -> None:
    """List, show and copy recipes.

    A recipe is a YAML file of configuration keys for one model and machine.

    [bold]Examples[/]
      chunkflow recipes list
      chunkflow recipes show tiny_random
      chunkflow recipes copy tiny_random first.yaml
    """


@command(recipes_app, "list", without=CONFIGURATION)
def list_recipes(request: Request) -> Result:
    """List the recipes with model, chunk size, K, longest sample and hardware.

    Includes the recipes in DIR/recipes of --config-dir DIR.

    [bold]Examples[/]
      chunkflow recipes list
      chunkflow recipes list --json
      chunkflow recipes list --config-dir .
    """
    from chunkflow_cli.cli import recipes

    return recipes.list_recipes(request.config_dir, json_output=request.json_output)


@command(recipes_app, "show", without=CONFIGURATION)
def show_recipe(request: Request, name: RecipeName) -> Result:
    """Print the file of a recipe.

    Keys that the recipe leaves out keep their defaults.

    [bold]Examples[/]
      chunkflow recipes show tiny_random
      chunkflow recipes show qwen7b --json
      chunkflow recipes show qwen7b > mine.yaml
    """
    from chunkflow_cli.cli import recipes

    return recipes.show(name, request.config_dir, json_output=request.json_output)


@command(recipes_app, "copy", without=CONFIGURATION)
def copy_recipe(
    request: Request,
    name: RecipeName,
    destination: Annotated[
        str | None, typer.Argument(metavar="DEST", help="File or folder to write. Default: ./NAME.yaml.")
    ] = None,
) -> Result:
    """Copy a recipe to a file that you can edit, and print how to run it.

    Never overwrites a file.

    [bold]Examples[/]
      chunkflow recipes copy tiny_random
      chunkflow recipes copy tiny_random my_run.yaml
      chunkflow train recipe=my_run.yaml train.steps=1
    """
    from chunkflow_cli.cli import recipes

    return recipes.copy(name, destination, request.config_dir, json_output=request.json_output)
