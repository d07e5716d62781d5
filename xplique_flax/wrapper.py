"""A Flax model as a Keras functional model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import jax
import keras
import numpy as np
import tensorflow as tf
from flax import nnx

from .assembly import connect
from .checks import (
    check_eval_mode,
    check_has_batch,
    check_holds_its_own,
    check_layer,
    check_module,
    check_not_bypassed,
    check_not_training,
    checked_devices,
    checked_input_shape,
    no_such_layer,
    parameters_of_state,
    refuse_to_save,
    why_hidden,
)
from .function import PlainFunction, WrappedFunction
from .fused import FusedModel, Head, Truncated
from .graph import Graph, ModelFunction, Value
from .layers import refuse_to_look_inside, why_no_output
from .linen import LinenFunction
from .nnx import NNXFunction
from .outputs import Output
from .release import CacheEntry, release_all
from .sections import LayeredModel


class ListedLayer(NamedTuple):
    """One line of `FlaxWrapper.list_layers`."""

    name: str
    shape: tuple[int | None, ...] | None
    """The shape of its output, with ``None`` for the batch; ``None`` if there is no such layer."""
    reason: str
    """Why it can't be addressed; empty if it can."""


class FlaxWrapper(LayeredModel):
    r"""A Flax model as a Keras functional model, which Xplique can explain.

    Parameters
    ----------
    flax_module : flax.linen.Module or flax.nnx.Module
        The model. It is not changed, nor does the wrapped model see what happens to it later.
    parameters : dict or FrozenDict, optional
        For Linen, what ``flax_module.init()`` returns: ``params``, and other collections that the
        model reads, such as ``batch_stats``. The arrays are copied. NNX modules, and Linen modules
        that are bound by ``bind()``, hold their own.
    input_shape : tuple of int, optional
        The shape of one sample, without the batch, such as ``(28, 28, 1)``. With it the model
        has layers, which Grad-CAM, Grad-CAM++, FEM, Guided Backprop, DeconvNet,
        ModelRandomization and sub-models need. Other methods do without.
    apply_kwargs : dict, optional
        Keyword arguments of each call, such as ``{"train": False}``.
    method : str or function, optional
        The method of the module that is called, by default ``__call__``, or a function
        ``method(module, inputs)``.
    rngs : dict, optional
        The random streams of a module that asks for some, such as
        ``{"dropout": jax.random.key(0)}``. They are the same ones at each call.
    output : str, int or function, optional
        Which array is explained where the module returns several: a key or an index of its
        output, or a function of it.
    preprocess : function, optional
        A function of JAX that is applied to each batch of inputs before the model, such as
        ``lambda x: x / 255``. Explanations are those of the inputs before it.
    eval_mode : bool, optional
        For NNX: whether the model is explained in evaluation mode, whatever mode it is in, which
        is the default. With False it is explained as it is, and updates of its state are dropped.
    devices : sequence of jax.Device, optional
        Devices of this process to spread each batch over, such as ``jax.devices()``. Each holds all
        parameters, and batches are padded to a multiple of their number. Methods that look inside
        the model, and models whose samples depend on each other, compute all on each device.

    Raises
    ------
    TypeError, ValueError
        If an argument is not of the accepted kind, or if they do not fit one another. What can
        be seen without inputs is raised here, and with ``input_shape`` everything is.

    Notes
    -----
    Inputs are an array or tensor of shape (N, \*input_shape), of any real dtype. They are
    computed on in float32, the outputs are float32, and a gradient has the dtype of the inputs.

    The model is called through one compiled JAX function per direction. Small networks of dense
    layers are operations of TensorFlow in its graphs, on a CPU, and quicker so. The layers compute
    only for those who look inside: a layer whose ``call`` was replaced, a sub-model, a clone.

    Layers are named by their module's path, such as ``Block_0.Conv_1``, or ``blocks.0.conv`` in
    NNX. What is named by ``jax.ad_checkpoint.checkpoint_name`` is a layer too. Each ReLU is a Keras
    ``ReLU`` layer. All that lies between two modules or ReLUs is one layer, named by the last thing
    that it does: a max pooling and the ``reshape`` after it are one layer ``reshape``. `summary`
    shows the names and shapes.
    Flax numbers modules in the order in which they are made: in ``nn.Dense(3)(nn.Dense(8)(x))``
    the outer one is ``Dense_0``. A module that is called twice is one layer with two nodes.

    The wrapper behaves as a Keras functional model does, and is tested to give the explanations
    of a native one with the same weights. It can't be trained, saved or exported through Keras.

    Threads may explain with one wrapper at the same time, but for Grad-CAM, Grad-CAM++ and TCAV:
    while they run they replace a layer's ``call``, of a native Keras model too.

    Examples
    --------
    A linear model, so that what to expect is known: the saliency of a class is the absolute value
    of its weights, whatever the inputs are.

    ```python
    import flax.linen as nn
    import jax
    import numpy as np
    from sklearn.datasets import load_iris
    from xplique.attributions import Saliency

    from xplique_flax import FlaxWrapper

    inputs, classes = load_iris(return_X_y=True)
    module = nn.Dense(3)
    parameters = module.init(jax.random.key(0), inputs)
    explainer = Saliency(FlaxWrapper(module, parameters))
    explanations = explainer(inputs, np.eye(3)[classes])

    kernel = parameters["params"]["kernel"]  # of shape (4, 3)
    print(np.allclose(explanations, abs(kernel).T[classes]))
    ```
    """

    _trackable_children = refuse_to_save

    def __init__(
        self,
        flax_module: Any,
        parameters: Any = None,
        *,
        input_shape: Sequence[int] | None = None,
        apply_kwargs: Mapping[str, Any] | None = None,
        method: str | Callable | None = None,
        rngs: Any = None,
        output: Output | None = None,
        preprocess: Callable | None = None,
        eval_mode: bool | None = None,
        devices: Sequence[jax.Device] | None = None,
    ) -> None:
        shape = checked_input_shape(input_shape)
        spread = checked_devices(devices)
        check_module(flax_module)
        check_eval_mode(eval_mode)
        function: WrappedFunction
        if isinstance(flax_module, nnx.Module):
            own = "an NNX module holds its own"
            check_holds_its_own("parameters", parameters, own, "FlaxWrapper(flax_module)")
            check_holds_its_own("rngs", rngs, own, "give the module its Rngs when you make it")
            function = NNXFunction(
                flax_module, apply_kwargs, method, eval_mode is not False, output, preprocess
            )
        else:
            flags = "the mode of a Linen module is an argument of its call"
            check_holds_its_own("eval_mode", eval_mode, flags, 'apply_kwargs={"train": False}')
            if flax_module.scope is not None:
                own = "a bound module holds its own"
                check_holds_its_own("parameters", parameters, own, "FlaxWrapper(flax_module)")
                flax_module, parameters = flax_module.unbind()
            function = LinenFunction(
                flax_module, parameters, apply_kwargs, method, rngs, output, preprocess
            )
        if spread:
            function.spread_over(spread)
        self._assemble(function, shape)
        self._check_no_batch_dimension(function, shape)

    @classmethod
    def from_function(
        cls,
        function: Callable,
        parameters: Any = None,
        *,
        input_shape: Sequence[int] | None = None,
        output: Output | None = None,
        preprocess: Callable | None = None,
        devices: Sequence[jax.Device] | None = None,
    ) -> FlaxWrapper:
        """Wrap a function of JAX, or a model of another library.

        Parameters
        ----------
        function : function
            ``function(inputs)``, or ``function(parameters, inputs)`` where parameters are given.
            It gets float32 arrays of shape (N, ...), and returns the outputs, with the batch first.
        parameters : pytree, optional
            What the function needs besides the inputs. What is no array in it is constant.
        input_shape, output, preprocess, devices
            As for `FlaxWrapper`. Layers are what the function names with
            ``jax.ad_checkpoint.checkpoint_name``, its ReLUs, and what lies between them.

        Returns
        -------
        wrapped : FlaxWrapper

        Raises
        ------
        TypeError, ValueError
            If the function can't be called like that.

        Examples
        --------
        The gradient of the squared distance to the origin is known:

        ```python
        import numpy as np
        from xplique.attributions import Saliency

        from xplique_flax import FlaxWrapper


        def squared_distance(scale, x):
            return scale * (x**2).sum(-1, keepdims=True)


        inputs = np.array([[1.0, -2.0], [3.0, 0.5]], "float32")
        wrapped = FlaxWrapper.from_function(squared_distance, np.float32(10))
        explanations = Saliency(wrapped)(inputs, np.ones((2, 1)))
        print(np.allclose(explanations, abs(2 * 10 * inputs)))
        ```
        """
        shape = checked_input_shape(input_shape)
        spread = checked_devices(devices)
        wrapped = PlainFunction(function, parameters, output, preprocess)
        if spread:
            wrapped.spread_over(spread)
        return cls._made(wrapped, shape)

    @classmethod
    def from_train_state(cls, flax_module: Any, state: Any, **kwargs: Any) -> FlaxWrapper:
        """Wrap a Linen module with what its training state holds.

        Parameters
        ----------
        flax_module : flax.linen.Module
            The module that the state was made for.
        state : flax.training.train_state.TrainState
            Its ``params`` are used, and each further field that is a dict, such as
            ``batch_stats``, as the collection of its name.
        **kwargs
            The other arguments of `FlaxWrapper`.

        Returns
        -------
        wrapped : FlaxWrapper

        Raises
        ------
        TypeError
            If it is no training state.

        Examples
        --------
        ```python
        import flax.linen as nn
        import jax
        import numpy as np
        import optax
        from flax.training.train_state import TrainState

        from xplique_flax import FlaxWrapper

        module = nn.Dense(3)
        inputs = np.ones((2, 4), "float32")
        params = module.init(jax.random.key(0), inputs)["params"]
        state = TrainState.create(apply_fn=module.apply, params=params, tx=optax.sgd(0.1))
        wrapped = FlaxWrapper.from_train_state(module, state)
        print(np.allclose(wrapped(inputs), state.apply_fn({"params": state.params}, inputs)))
        ```
        """
        return cls(flax_module, parameters_of_state(state), **kwargs)

    @classmethod
    def _made(
        cls, function: ModelFunction, shape: tuple | None, like: FusedModel | None = None
    ) -> FlaxWrapper:
        wrapped = cls.__new__(cls)
        wrapped._assemble(function, shape, like)
        return wrapped

    def _derived(
        self, function: ModelFunction, shape: tuple | None, like: FusedModel | None = None
    ) -> FlaxWrapper:
        with self._fused.compiled.mesh():
            return FlaxWrapper._made(function, shape, like)

    def _assemble(
        self, function: ModelFunction, shape: tuple | None, like: FusedModel | None = None
    ) -> None:
        release_all(FlaxWrapper)
        graph = like.graph if like else None
        if shape is not None and graph is None:
            graph = Graph(function, shape)
        inputs, outputs, variables = connect(function, graph, shape)
        super().__init__(inputs=inputs, outputs=outputs, name=function.name)
        entry = CacheEntry(self._inputs, self._outputs)
        self._fused = FusedModel(function, graph, variables, entry, like.compiled if like else None)
        if type(self) is FlaxWrapper:
            self.__class__ = _Cloneable  # type: ignore[assignment]

    def _check_no_batch_dimension(self, function: WrappedFunction, shape: tuple | None) -> None:
        # Flax's convolutions fold an axis too many into the batch without a word.
        graph = self._fused.graph
        if graph is None or shape is None:
            return
        if shape[0] == 1 and len(shape) in graph.convolution_ranks and function.accepts(shape[1:]):
            raise ValueError(
                f"`input_shape` is {shape}, which begins with a batch dimension of 1: the model's "
                f"convolutions take inputs of {len(shape)} dimensions, with the batch. Accepted is "
                f"the shape of one sample, without it. Pass {shape[1:]}."
            )

    @tf.autograph.experimental.do_not_convert
    def __call__(self, inputs: Any, training: bool | None = None, **kwargs: Any) -> Any:
        """Return the outputs, of shape (N, ...) and dtype float32, for inputs of shape (N, ...)."""
        if keras.utils.is_keras_tensor(inputs):
            return super().__call__(inputs)
        check_not_training(training)
        return self.call(inputs)

    def call(self, inputs: Any, training: Any = None, mask: Any = None) -> tf.Tensor:
        """Compute the outputs of tensors, as ``__call__`` does."""
        self._release()
        tensor = self._fused.checked(inputs)
        return super().call(tensor) if self._watched() else self._fused(tensor)

    def compute_output_spec(self, inputs: Any, training: Any = None, mask: Any = None) -> Any:
        """Return the output's symbolic tensor, for a model that is part of another one."""
        shape = tuple(inputs.shape)
        return keras.KerasTensor((shape[0], *self._fused.output_shape(shape[1:])), dtype="float32")

    def truncate(self, layer: str | int) -> FlaxWrapper:
        """Return the model up to the output of a layer.

        It is what ``output_layer`` of Xplique's explainers would give, and as quick to call as
        the whole model: explain the logits of a model that ends in a softmax with it.

        Parameters
        ----------
        layer : str or int
            The name or index of the layer. Where a module is called several times, its first
            call counts, as for ``layer.output`` of Keras.

        Returns
        -------
        truncated : FlaxWrapper
            A model of its own, with the parameters that this one has now.

        Raises
        ------
        ValueError
            If there is no such layer, or if its output is not one array with the batch first.

        Examples
        --------
        The logits of a model that ends in a softmax:

        ```python
        import flax.linen as nn
        import jax
        import numpy as np
        import tensorflow as tf

        from xplique_flax import FlaxWrapper

        module = nn.Sequential([nn.Dense(3), nn.softmax])
        inputs = np.ones((2, 4), "float32")
        parameters = module.init(jax.random.key(0), inputs)
        wrapped = FlaxWrapper(module, parameters, input_shape=(4,))
        print([layer.name for layer in wrapped.layers])

        logits = wrapped.truncate("layers_0")
        print(np.allclose(tf.nn.softmax(logits(inputs)), wrapped(inputs)))
        ```
        """
        graph, name, _ = self._cut(layer)
        part = Truncated(self._fused, graph, name, f"{self.name}_{name}")
        return self._derived(part, graph.input_shape)

    def split(self, layer: str | int) -> tuple[FlaxWrapper, FlaxWrapper]:
        """Return the model up to the output of a layer, and the rest of it.

        Both are called as quickly as the whole model, which methods need that explore the
        activations of a layer, such as CRAFT.

        Parameters
        ----------
        layer : str or int
            The name or index of the layer, as for `truncate`. The rest of the model may depend on
            nothing but its output.

        Returns
        -------
        features, head : FlaxWrapper
            ``head(features(inputs))`` equals ``wrapped(inputs)``. Both have the parameters that
            the model has now.

        Raises
        ------
        ValueError
            If there is no such layer, if its output is not one array with the batch first, or if
            a connection goes past it.

        Examples
        --------
        ```python
        import flax.linen as nn
        import jax
        import numpy as np

        from xplique_flax import FlaxWrapper

        module = nn.Sequential([nn.Dense(5), nn.relu, nn.Dense(3)])
        inputs = np.ones((2, 4), "float32")
        parameters = module.init(jax.random.key(0), inputs)
        wrapped = FlaxWrapper(module, parameters, input_shape=(4,))

        features, head = wrapped.split("relu")
        print(features.output_shape, head.output_shape)
        print(np.allclose(head(features(inputs)), wrapped(inputs)))
        ```
        """
        graph, name, value = self._cut(layer)
        check_not_bypassed(name, graph)
        features = Truncated(self._fused, graph, name, f"{self.name}_{name}")
        head = Head(self._fused, graph, name, f"{self.name}_after_{name}")
        shape = tuple(size for size in value.shape(None)[1:] if size is not None)
        return self._derived(features, graph.input_shape), self._derived(head, shape)

    def _cut(self, layer: str | int) -> tuple[Graph, str, Value]:
        name = self._layer(layer).name
        graph = self._fused.graph
        assert graph is not None
        if name not in {cell.layer for cell in graph.cells}:
            raise ValueError(
                f"`layer` is {layer!r}, which computes nothing. Accepted are layers after it."
            )
        first = next(cell for cell in graph.cells if cell.layer == name)
        check_has_batch(name, first.outputs)
        return graph, name, first.outputs[0]

    def with_parameters(self, parameters: Any) -> FlaxWrapper:
        """Return the same model with other parameters, without compiling it again.

        Parameters
        ----------
        parameters : dict, FrozenDict, nnx.Module or pytree
            Parameters of the same structure, shapes and dtypes as those that the model was
            wrapped with: another checkpoint. For NNX, another instance of the module, or its state.

        Returns
        -------
        wrapped : FlaxWrapper
            A model of its own. This one is not changed.

        Raises
        ------
        TypeError, ValueError
            If they are other parameters than that.

        Examples
        --------
        ```python
        import flax.linen as nn
        import jax
        import numpy as np

        from xplique_flax import FlaxWrapper

        module, inputs = nn.Dense(3), np.ones((2, 4), "float32")
        checkpoints = [module.init(jax.random.key(seed), inputs) for seed in range(3)]
        wrapped = FlaxWrapper(module, checkpoints[0])
        for parameters in checkpoints:
            outputs = wrapped.with_parameters(parameters)(inputs)
            print(np.allclose(outputs, module.apply(parameters, inputs)))
        ```
        """
        function = self._fused.function.with_parameters(parameters)
        return self._derived(function, self._fused.shape, self._fused)

    def list_layers(self) -> list[ListedLayer]:
        """Return the layers that can be addressed, and the modules that have no layer, and why.

        Returns
        -------
        layers : list of ListedLayer
            Tuples of ``name``, ``shape`` (``None`` stands for the batch) and ``reason``, which is
            empty for a layer that can be addressed.

        Raises
        ------
        ValueError
            If the model was wrapped without ``input_shape``.

        Examples
        --------
        ```python
        import flax.linen as nn
        import jax
        import numpy as np

        from xplique_flax import FlaxWrapper

        module = nn.Sequential([nn.Dense(5), nn.relu, nn.Dense(3)])
        parameters = module.init(jax.random.key(0), np.ones((1, 4)))
        wrapped = FlaxWrapper(module, parameters, input_shape=(4,))
        layers = wrapped.list_layers()
        print([(layer.name, layer.shape) for layer in layers])
        print(all(layer.reason == "" for layer in layers))
        ```
        """
        found = [
            ListedLayer(layer.name, _shape_of(layer.output), why_no_output(layer))
            for layer in self.layers
            if not isinstance(layer, keras.layers.InputLayer)
        ]
        hidden = self._fused.hidden.items()
        return found + [ListedLayer(name, None, why_hidden(where)) for name, where in hidden]

    def get_layer(self, name: str | None = None, index: int | None = None) -> Any:
        """Return a layer by its name or index, as Keras's ``get_layer``."""
        if (name is None) == (index is None):
            return super().get_layer(name, index)
        return self._layer(index if name is None else name)

    def _layer(self, layer: str | int | None) -> Any:
        layers = self.layers
        check_layer(layer)
        if isinstance(layer, int):
            if not -len(layers) <= layer < len(layers):
                raise ValueError(
                    f"`layer` is {layer}, and the model has {len(layers)} layers. Accepted are "
                    f"indices from {-len(layers)} to {len(layers) - 1}."
                )
            return layers[layer]
        names = [known.name for known in layers]
        if layer in names:
            return layers[names.index(layer)]
        raise ValueError(no_such_layer(layer, names, self._fused.hidden))

    @property
    def outputs(self) -> Any:
        """The symbolic outputs."""
        core = vars(self).get("_fused")
        if core is not None:
            core.cache_entry.announce()
        return self._outputs

    def _release(self) -> None:
        """Leave the cache in which Xplique would keep this model alive for ever.

        It is done at each call, and costs a later explainer nothing. A graph of TensorFlow that
        computes a small network of dense layers does not call: the next wrapper then does it.
        """
        self._fused.cache_entry.release()

    def get_weights(self) -> list[np.ndarray]:
        """Return the values of the parameters, layer by layer, in Keras's order."""
        self._require_inside()
        self._release()
        return super().get_weights()

    def set_weights(self, weights: Sequence[np.ndarray]) -> None:
        """Set the values of the parameters, in the order of ``get_weights``."""
        self._require_inside()
        super().set_weights(weights)

    def summary(self, *args: Any, **kwargs: Any) -> None:
        """Print the layers, with their outputs' shapes and their numbers of parameters."""
        self._require_inside()
        super().summary(*args, **kwargs)

    def count_params(self) -> int:
        """Return the number of parameters."""
        self._require_inside()
        return super().count_params()

    @property
    def layers(self) -> list[Any]:
        """The layers, for a model that was made with ``input_shape``."""
        if "_fused" in vars(self):  # else Keras is building the model
            self._require_inside()
        return super().layers

    def _require_inside(self) -> None:
        if self._fused.graph is None:
            refuse_to_look_inside()


class _Cloneable(FlaxWrapper):
    # Wrapped models are instances of this: Keras's `clone_model` makes a clone by the constructor
    # of the model's class where that takes inputs and outputs, and else a model that calls each
    # layer by itself.
    def __new__(cls, inputs: Any, outputs: Any, name: str | None = None, **kwargs: Any) -> Any:
        return LayeredModel(inputs, outputs, name, **kwargs)

    def __init__(
        self, inputs: Any, outputs: Any, name: str | None = None, **kwargs: Any
    ) -> NoReturn:
        raise AssertionError("__new__ makes an instance of another class")


for _name in ("__name__", "__qualname__", "__doc__"):
    setattr(_Cloneable, _name, getattr(FlaxWrapper, _name))


def _shape_of(output: Any) -> tuple[int | None, ...] | None:
    return None if isinstance(output, list | tuple) else tuple(output.shape)


def _refused(what: str, where: str) -> Callable[..., NoReturn]:
    def refuse(self: Any, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(
            f"FlaxWrapper.{what}() is not available: a wrapped model is made to be explained. "
            f"{where}"
        )

    refuse.__name__ = what
    refuse.__doc__ = f"Not available. {where}"
    return refuse


_TRAIN = "Train the Flax module itself, for example with Optax, and wrap it again."
_SAVE = (
    "Save the parameters of the Flax module, for example with Orbax or flax.serialization, and "
    "wrap them again after restoring."
)
_EXPORT = "Export the Flax module itself, for example with jax.export."
for _name, _where in {
    "fit": _TRAIN,
    "train_on_batch": _TRAIN,
    "train_step": _TRAIN,
    "save": _SAVE,
    "save_weights": _SAVE,
    "load_weights": _SAVE,
    "get_config": _SAVE,
    "to_json": _SAVE,
    "export": _EXPORT,
    "quantize": _EXPORT,
}.items():
    setattr(FlaxWrapper, _name, _refused(_name, _where))
