// What a training step asks of tensors again and again, asked through their Python methods: a question costs
// a third of what it costs in Python, and of a small layer's step each microsecond is two percent. Nothing of
// torch is linked.
#include <optional>

#include "common/cpu.h"
#include "cpu/masked_matmul.h"
#include "torch_objects.h"

namespace py = pybind11;

namespace autoflip {

Torch torch;
Names names;

namespace {

// Holders of a gradient as a hook sees them: references to the Python object and to the tensor, and where it
// is a view, to what it is a view of. AccumulateGrad asks less (references to the tensor) before it makes a
// gradient the parameter's own; who else holds the memory would cost as much as all other questions.
struct Holders {
  long objects, tensors, base_objects, base_tensors;
  bool operator==(const Holders& o) const {
    return objects == o.objects && tensors == o.tensors && base_objects == o.base_objects &&
           base_tensors == o.base_tensors;
  }
} alone[2];  // of one that nobody but the engine has: no view, and a view; zeros until they are known

PyObject* kernel_here(PyObject*, PyObject* const* tensors, Py_ssize_t n) {
  bool here = quiet();
  for (Py_ssize_t i = 0; here && i < n; ++i) here = ordinary(tensors[i]);
  return PyBool_FromLong(here);
}

// Bytes of an entry where its floating tensor may be read here, else 0.
PyObject* word_here(PyObject*, PyObject* tensor) {
  return PyLong_FromLong(quiet() && in_memory(tensor) ? entry_bytes(tensor) : 0);
}

bool same(PyObject* answer, PyObject* wanted) {
  const int found = answer ? PyObject_RichCompareBool(answer, wanted, Py_EQ) : -1;
  Py_XDECREF(answer);
  if (PyErr_Occurred()) PyErr_Clear();
  return found == 1;
}

// Whether a linear layer may go the way it went before: what it knows, then x, weight, bias (or None) and
// mask of now. It knows weight, bias, mask, the mask's version, and the shapes of x, weight and bias.
PyObject* linear_again(PyObject*, PyObject* const* args, Py_ssize_t n) {
  PyObject* known = args[0];
  if (n != 5 || !PyTuple_Check(known) || PyTuple_GET_SIZE(known) < 7) Py_RETURN_FALSE;
  const auto at = [&](int i) { return PyTuple_GET_ITEM(known, i); };
  PyObject *x = args[1], *weight = args[2], *bias = args[3], *mask = args[4];
  return PyBool_FromLong(
      at(0) == weight && at(1) == bias && at(2) == mask &&
      same(PyObject_GetAttr(mask, names.version), at(3)) && quiet() && ordinary(x) &&
      same(PyObject_GetAttr(x, names.shape), at(4)) && ordinary(weight) &&
      same(PyObject_GetAttr(weight, names.shape), at(5)) &&
      (bias == Py_None || (ordinary(bias) && same(PyObject_GetAttr(bias, names.shape), at(6)))) &&
      is(PyObject_CallOneArg(torch.autocast, names.cpu), Py_False));
}

// --- looks: whether a weight is zero wherever it is pruned

struct Look {
  const void* weight;  // the last one that was found to be contiguous floats in the CPU's memory
  int bytes;           // of its entries
  const uint8_t* mask;
  int64_t entries;
  PyObject* owner;  // of the mask's memory
};

void free_look(PyObject* capsule) {
  Look* look = static_cast<Look*>(PyCapsule_GetPointer(capsule, nullptr));
  Py_XDECREF(look->owner);
  delete look;
}

PyObject* look(PyObject* capsule, PyObject* weight) {
  Look& look = *static_cast<Look*>(PyCapsule_GetPointer(capsule, nullptr));
  // a trace must see the mask
  if (!is(PyObject_CallNoArgs(torch.tracing), Py_False)) Py_RETURN_FALSE;
  const int bytes = entry_bytes(weight);
  const void* w = bytes ? address(method(weight, names.data_ptr)) : nullptr;
  if (!w || !contiguous(weight)) Py_RETURN_FALSE;
  if (w != look.weight || bytes != look.bytes) {
    if (!in_memory(weight) || number(method(weight, names.numel)) != look.entries) Py_RETURN_FALSE;
    look.weight = w;
    look.bytes = bytes;
  }
  const MaskedMatmul& k = AUTOFLIP_PICK(masked_matmul);
  std::optional<py::gil_scoped_release> release;
  if (look.entries >= kSerialElements) release.emplace();
  const bool clean = k.is_clean(w, look.mask, look.entries, bytes);
  release.reset();
  return PyBool_FromLong(clean);
}

Holders holders(PyObject* g) {
  Holders found{long(Py_REFCNT(g)), number(method(g, names.use_count)), -1, -1};
  if (PyObject* base = PyObject_GetAttr(g, names.base)) {
    if (base != Py_None) {
      found.base_objects = long(Py_REFCNT(base));
      found.base_tensors = number(method(base, names.use_count));
    }
    Py_DECREF(base);
  }
  if (PyErr_Occurred()) PyErr_Clear();
  return found;
}

// --- hooks

struct Job {
  uint8_t* mask;
  int64_t entries;
  PyObject* otherwise;
};

void free_job(PyObject* capsule) {
  Job* job = static_cast<Job*>(PyCapsule_GetPointer(capsule, nullptr));
  Py_XDECREF(job->otherwise);
  delete job;
}

bool unseen(PyObject* g) {
  const Holders found = holders(g);
  return found == alone[found.base_objects > 0];
}

// Called by the engine with a gradient. In place where nobody else holds it, or what it is a view of, and no
// derivative of it is wanted.
PyObject* hook(PyObject* capsule, PyObject* g) {
  const Job& job = *static_cast<Job*>(PyCapsule_GetPointer(capsule, nullptr));
  // what has no memory of its own (a batch of gradients, say) has no data_ptr; the rest is as at the forward
  // pass
  const int bytes = entry_bytes(g);
  if (bytes && reinterpret_cast<PyObject*>(Py_TYPE(g)) == torch.tensor &&
      is(PyObject_CallNoArgs(torch.grad_enabled), Py_False) &&
      is(PyObject_GetAttr(g, names.is_cpu), Py_True) && contiguous(g) && unseen(g)) {
    if (void* data = address(method(g, names.data_ptr))) {
      const MaskedMatmul& k = AUTOFLIP_PICK(masked_matmul);
      std::optional<py::gil_scoped_release> release;
      if (job.entries >= kSerialElements) release.emplace();
      k.select(data, job.mask, job.entries, bytes, data, 1);
      release.reset();
      Py_RETURN_NONE;
    }
  }
  return PyObject_CallOneArg(job.otherwise, g);
}

PyObject* probe(PyObject*, PyObject* g) {
  const Holders found = holders(g);
  if (found.tensors > 0) alone[found.base_objects > 0] = found;
  Py_RETURN_NONE;
}

PyMethodDef hook_def = {"masked_gradient", hook, METH_O, nullptr};
PyMethodDef probe_def = {"masked_gradient_probe", probe, METH_O, nullptr};
PyMethodDef here_def = {"masked_kernel_here",
                        reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(kernel_here)),
                        METH_FASTCALL, nullptr};
PyMethodDef again_def = {"masked_linear_again",
                         reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(linear_again)),
                         METH_FASTCALL, nullptr};
PyMethodDef word_def = {"masked_word_here", word_here, METH_O, nullptr};
PyMethodDef look_def = {"masked_look", look, METH_O, nullptr};

py::object bound(PyMethodDef& def, void* state, void (*free)(PyObject*)) {
  py::object capsule = py::reinterpret_steal<py::object>(PyCapsule_New(state, nullptr, free));
  return py::reinterpret_steal<py::object>(PyCFunction_New(&def, capsule.ptr()));
}

py::object make_look(uintptr_t mask, int64_t entries, py::object owner) {
  return bound(look_def, new Look{nullptr, 0, at<const uint8_t>(mask), entries, owner.release().ptr()},
               free_look);
}

py::object make_hook(uintptr_t mask, int64_t entries, py::object otherwise) {
  return bound(hook_def, new Job{at<uint8_t>(mask), entries, otherwise.release().ptr()}, free_job);
}

void meet(py::dict given) {
  const auto take = [&](const char* name) { return py::object(given[name]).release().ptr(); };
  torch = {take("tensor"),     take("parameter"), take("float32"),      take("float64"),    take("float16"),
           take("bfloat16"),   take("modes"),     take("tracing"),      take("transforms"), take("batched"),
           take("forward_ad"), take("strided"),   take("grad_enabled"), take("autocast"),   take("threads")};
  const auto name = [](const char* text) { return PyUnicode_InternFromString(text); };
  names = {name("dtype"),         name("is_cpu"),           name("is_contiguous"),
           name("numel"),         name("data_ptr"),         name("_use_count"),
           name("_base"),         name("_version"),         name("shape"),
           name("cpu"),           name("_current_level"),   name("layout"),
           name("is_neg"),        name("new_empty"),        name("save_for_backward"),
           name("saved_tensors"), name("needs_input_grad"), name("job"),
           name("operand"),       name("values"),           name("panel")};
}

}  // namespace

void bind_hook(py::module_& m) {
  const auto add = [&](PyMethodDef& def) {
    m.add_object(def.ml_name, py::reinterpret_steal<py::object>(PyCFunction_New(&def, nullptr)));
  };
  add(here_def);
  add(again_def);
  add(word_def);
  add(probe_def);
  m.def("masked_hook", make_hook,
        "a hook that sets a floating gradient to zero wherever the mask (address, entries) is not set; what "
        "it may not "
        "write into it hands to the last argument");
  m.def("masked_look", make_look,
        "a function that tells whether a weight is contiguous floats in the CPU's memory and zero wherever "
        "the mask "
        "(address, entries, what keeps it alive) is not set");
  m.def("masked_meet", meet, "torch's types and functions that the functions here ask");
}

}  // namespace autoflip
