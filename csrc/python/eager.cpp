// The short way of a repeated eager call, in C for the sake of its cost: basisconv_kernels/core/eager.py tells what it
// is and when it may be taken, and hands the things of torch that are looked at to `watch`. After a kernel that filled
// the caches the same in Python took 17 us beside the op; this takes 10.
//
// Python's limited API of 3.10 alone, nothing of torch: its module serves every Python and every torch. Functions
// return a new reference, or nullptr with an error set.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <array>
#include <utility>

namespace {

constexpr Py_ssize_t kMostOperands = 16, kMostWatched = 32;

// What `watch` was given.
struct Watched {
  PyObject* ordinary = nullptr;         // the types whose tensors are seen by nobody but torch
  PyObject* disturbances = nullptr;     // functions that tell whether somebody wants to see or change calls of torch
  PyObject* records = nullptr;          // whether gradients are recorded
  PyObject* wish = nullptr;             // the backend asked for
  PyObject* wish_of_context = nullptr;  // what a block around the call asked for ...
  PyObject* nobody = nullptr;           // ... or this, then the environment speaks
  PyObject* environment = nullptr;      // its variables, None where only `wish` can ask
  PyObject* variable = nullptr;         // the one that names a backend
};
Watched watched;

struct Names {
  PyObject *requires_grad, *version, *data_ptr, *stride, *shape;
};
Names names;

// A reference that is given back at the end of its scope.
class Owned {
 public:
  explicit Owned(PyObject* object) : object_(object) {}
  ~Owned() { Py_XDECREF(object_); }
  Owned(const Owned&) = delete;
  Owned& operator=(const Owned&) = delete;
  PyObject* get() const { return object_; }
  explicit operator bool() const { return object_ != nullptr; }

 private:
  PyObject* object_;
};

PyObject* item(PyObject* tuple, Py_ssize_t i) { return PyTuple_GetItem(tuple, i); }  // borrowed

// 1 or 0 as the function answers, -1 with an error set.
int truth_of(PyObject* function) {
  const Owned answer(PyObject_CallNoArgs(function));
  return answer ? PyObject_IsTrue(answer.get()) : -1;
}

bool is_ordinary(PyObject* value) {
  if (value == Py_None) return true;
  PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(value));
  for (Py_ssize_t i = 0; i < PyTuple_Size(watched.ordinary); ++i) {
    if (item(watched.ordinary, i) == type) return true;
  }
  return false;
}

// Whether a native op may be called on these tensors, or None, without anybody noticing; -1 with an error set.
int plain(PyObject* const* tensors, Py_ssize_t count) {
  for (Py_ssize_t i = 0; i < count; ++i) {
    if (!is_ordinary(tensors[i])) return 0;
  }
  for (Py_ssize_t i = 0; i < PyTuple_Size(watched.disturbances); ++i) {
    const int disturbed = truth_of(item(watched.disturbances, i));
    if (disturbed != 0) return disturbed < 0 ? -1 : 0;
  }
  const int records = truth_of(watched.records);
  if (records <= 0) return records < 0 ? -1 : 1;
  for (Py_ssize_t i = 0; i < count; ++i) {
    if (tensors[i] == Py_None) continue;
    const Owned wants(PyObject_GetAttr(tensors[i], names.requires_grad));
    const int wanted = wants ? PyObject_IsTrue(wants.get()) : -1;
    if (wanted != 0) return wanted < 0 ? -1 : 0;
  }
  return 1;
}

PyObject* wish() {
  if (watched.environment != Py_None) {
    const Owned asked(PyObject_CallNoArgs(watched.wish_of_context));
    if (!asked) return nullptr;
    if (asked.get() == watched.nobody) {
      if (PyDict_GetItemWithError(watched.environment, watched.variable) == nullptr) {
        if (PyErr_Occurred()) return nullptr;
        Py_RETURN_NONE;
      }
    }
  }
  return PyObject_CallNoArgs(watched.wish);
}

// 1 where equal values are of the same kinds too, elements of tuples included: 1, 1.0 and True are equal, but not all
// of them are good strides.
bool of_same_kind(PyObject* a, PyObject* b) {
  if (a == b) return true;
  if (Py_TYPE(a) != Py_TYPE(b)) return false;
  if (!PyTuple_Check(a)) return true;
  if (PyTuple_Size(a) != PyTuple_Size(b)) return false;
  for (Py_ssize_t i = 0; i < PyTuple_Size(a); ++i) {
    if (Py_TYPE(item(a, i)) != Py_TYPE(item(b, i))) return false;
  }
  return true;
}

bool of_same_kinds(PyObject* some, PyObject* others) {
  const Py_ssize_t count = PyTuple_Size(some);
  if (count != PyTuple_Size(others)) return false;
  for (Py_ssize_t i = 0; i < count; ++i) {
    if (!of_same_kind(item(some, i), item(others, i))) return false;
  }
  return true;
}

// The result of the native op, None where it refuses: the long way has the words for it.
PyObject* run(PyObject* native, PyObject* operands) {
  PyObject* result = PyObject_Call(native, operands, nullptr);
  if (result != nullptr || !PyErr_ExceptionMatches(PyExc_RuntimeError)) return result;
  PyErr_Clear();
  Py_RETURN_NONE;
}

PyObject* key_of(PyObject* packed, PyObject* arguments, PyObject* rest) {
  const Owned wished(wish());
  if (!wished) return nullptr;
  const Owned address(PyLong_FromVoidPtr(packed));
  return address ? PyTuple_Pack(4, address.get(), wished.get(), arguments, rest) : nullptr;
}

// What Python sees, from here on.

PyObject* py_watch(PyObject*, PyObject* const* given, Py_ssize_t count) {
  const std::array<PyObject**, 8> places{&watched.ordinary,    &watched.disturbances,    &watched.records,
                                         &watched.wish,        &watched.wish_of_context, &watched.nobody,
                                         &watched.environment, &watched.variable};
  if (count != static_cast<Py_ssize_t>(places.size()) || !PyTuple_Check(given[0]) || !PyTuple_Check(given[1]) ||
      !(given[6] == Py_None || PyDict_Check(given[6]))) {
    PyErr_SetString(PyExc_TypeError, "watch: two tuples, four things, a dict or None and a key expected");
    return nullptr;
  }
  for (size_t i = 0; i < places.size(); ++i) {
    Py_INCREF(given[i]);
    Py_XDECREF(*places[i]);
    *places[i] = given[i];
  }
  Py_RETURN_NONE;
}

bool ready(bool right_kinds, const char* usage) {
  if (watched.ordinary != nullptr && right_kinds) return true;
  PyErr_SetString(PyExc_TypeError, watched.ordinary == nullptr ? "nothing is watched yet" : usage);
  return false;
}

PyObject* py_plain(PyObject*, PyObject* const* tensors, Py_ssize_t count) {
  if (!ready(true, "")) return nullptr;
  const int answer = plain(tensors, count);
  return answer < 0 ? nullptr : PyBool_FromLong(answer);
}

PyObject* py_key(PyObject*, PyObject* const* given, Py_ssize_t count) {
  if (!ready(count == 3, "key: packed, arguments, rest expected")) return nullptr;
  return key_of(given[0], given[1], given[2]);
}

PyObject* py_call(PyObject*, PyObject* const* given, Py_ssize_t count) {
  // known, native, packed, arguments, rest, then the tensors that the op takes before packed
  if (!ready(count > 5 && PyDict_Check(given[0]) && PyTuple_Check(given[3]),
             "call: known, native, packed, arguments, rest, tensors... expected")) {
    return nullptr;
  }
  PyObject *known = given[0], *packed = given[2], *arguments = given[3];
  const Owned key(key_of(packed, arguments, given[4]));
  if (!key) return nullptr;
  PyObject* found = PyDict_GetItemWithError(known, key.get());  // borrowed: (arguments, plan)
  if (found == nullptr) {
    if (PyErr_Occurred()) {
      if (!PyErr_ExceptionMatches(PyExc_TypeError)) return nullptr;
      PyErr_Clear();  // a list for a tuple
    }
    Py_RETURN_NONE;
  }
  PyObject *same = item(found, 0), *plan = item(found, 1);
  if (same == nullptr || plan == nullptr) return nullptr;
  if (!of_same_kinds(same, arguments)) Py_RETURN_NONE;
  const Py_ssize_t tensors = count - 5;
  const Owned operands(PyTuple_New(tensors + 2));
  if (!operands) return nullptr;
  for (Py_ssize_t i = 0; i < tensors + 2; ++i) {
    PyObject* operand = i < tensors ? given[5 + i] : i == tensors ? packed : plan;
    Py_INCREF(operand);
    PyTuple_SetItem(operands.get(), i, operand);
  }
  const int seen_by_nobody = plain(given + 5, tensors);
  if (seen_by_nobody < 0) return nullptr;
  if (!seen_by_nobody || !is_ordinary(packed)) Py_RETURN_NONE;
  PyObject* result = run(given[1], operands.get());
  if (result == Py_None && PyDict_DelItem(known, key.get()) < 0) PyErr_Clear();  // another thread did
  return result;
}

// Whether a tensor still is what was packed: the same object, memory, extent and version; -1 with an error set.
int unchanged(PyObject* tensor, PyObject* known) {
  // known: tensor, an alias that keeps its memory, address, version, shape, strides
  const Owned address(PyObject_CallMethodObjArgs(tensor, names.data_ptr, nullptr));
  if (!address) return -1;
  int same = PyObject_RichCompareBool(address.get(), item(known, 2), Py_EQ);
  if (same <= 0) return same;
  const Owned version(PyObject_GetAttr(tensor, names.version));
  if (!version) return -1;
  same = PyObject_RichCompareBool(version.get(), item(known, 3), Py_EQ);
  if (same <= 0) return same;
  const Owned shape(PyObject_GetAttr(tensor, names.shape));
  if (!shape) return -1;
  same = PyObject_RichCompareBool(shape.get(), item(known, 4), Py_EQ);
  if (same <= 0) return same;
  const Owned strides(PyObject_CallMethodObjArgs(tensor, names.stride, nullptr));
  return strides ? PyObject_RichCompareBool(strides.get(), item(known, 5), Py_EQ) : -1;
}

// 1 where `holder[name] is value`; -1 with an error set.
int holds(PyObject* holder, PyObject* name, PyObject* value) {
  if (name == nullptr || value == nullptr) return -1;  // of a tuple that is too short
  PyObject* found = PyDict_GetItemWithError(holder, name);
  return found == value ? 1 : found == nullptr && PyErr_Occurred() ? -1 : 0;
}

PyObject* py_repeat(PyObject*, PyObject* const* given, Py_ssize_t count) {
  // memory, the layer's __dict__, then a tensor or None for each hole; see core/eager.py
  if (!ready(count > 2 && PyTuple_Check(given[0]) && PyTuple_Size(given[0]) == 6 && PyDict_Check(given[1]),
             "repeat: memory, __dict__, tensors... expected")) {
    return nullptr;
  }
  PyObject *memory = given[0], *layer = given[1];
  PyObject *native = item(memory, 0), *wished = item(memory, 1), *attributes = item(memory, 2),
           *tensors = item(memory, 3), *operands = item(memory, 4), *holes = item(memory, 5);
  const bool tuples =
      PyTuple_Check(attributes) && PyTuple_Check(tensors) && PyTuple_Check(operands) && PyTuple_Check(holes);
  if (!ready(tuples, "repeat: a memory of two things and four tuples expected")) return nullptr;
  for (Py_ssize_t i = 0; i < PyTuple_Size(attributes); ++i) {
    PyObject* attribute = item(attributes, i);  // name, value
    const int same = holds(layer, item(attribute, 0), item(attribute, 1));
    if (same < 0) return nullptr;
    if (same == 0) Py_RETURN_NONE;
  }
  for (Py_ssize_t i = 0; i < PyTuple_Size(tensors); ++i) {
    PyObject* tensor = item(tensors, i);  // name of the layer's dict, name in there, what was there, snapshot or None
    PyObject *place = item(tensor, 0), *snapshot = item(tensor, 3);
    if (place == nullptr || snapshot == nullptr) return nullptr;
    PyObject* holder = PyDict_GetItemWithError(layer, place);
    if (holder == nullptr || !PyDict_Check(holder)) {
      if (PyErr_Occurred()) return nullptr;
      Py_RETURN_NONE;
    }
    int same = holds(holder, item(tensor, 1), item(tensor, 2));
    if (same > 0 && snapshot != Py_None) same = unchanged(item(tensor, 2), snapshot);
    if (same < 0) return nullptr;
    if (same == 0) Py_RETURN_NONE;
  }
  const Owned wish_now(wish());
  if (!wish_now) return nullptr;
  const int same_wish = PyObject_RichCompareBool(wish_now.get(), wished, Py_EQ);
  if (same_wish < 0) return nullptr;
  if (same_wish == 0) Py_RETURN_NONE;

  const Py_ssize_t size = PyTuple_Size(operands);
  std::array<PyObject*, kMostWatched> seen;  // borrowed
  if (!ready(size <= kMostOperands, "repeat: more operands than any op has")) return nullptr;
  const Owned filled(PyTuple_New(size));
  if (!filled) return nullptr;
  for (Py_ssize_t i = 0; i < size; ++i) seen[i] = item(operands, i);
  for (Py_ssize_t i = 0; i < PyTuple_Size(holes); ++i) {
    const Py_ssize_t hole = PyLong_AsSsize_t(item(holes, i));
    if (hole == -1 && PyErr_Occurred()) return nullptr;
    if (i + 2 >= count || hole < 0 || hole >= size) {
      PyErr_SetString(PyExc_TypeError, "repeat: a hole without a tensor, or outside the operands");
      return nullptr;
    }
    seen[hole] = given[i + 2];
  }
  for (Py_ssize_t i = 0; i < size; ++i) {
    Py_INCREF(seen[i]);
    PyTuple_SetItem(filled.get(), i, seen[i]);
  }
  // Sources of the weights too: where they want a gradient the operands may be made of them.
  Py_ssize_t watched_tensors = size;
  for (Py_ssize_t i = 0; i < PyTuple_Size(tensors); ++i) {
    PyObject* tensor = item(tensors, i);
    if (item(tensor, 3) == Py_None) continue;
    if (!ready(watched_tensors < kMostWatched, "repeat: more sources than any layer has")) return nullptr;
    seen[watched_tensors++] = item(tensor, 2);
  }
  const int seen_by_nobody = plain(seen.data(), watched_tensors);
  if (seen_by_nobody < 0) return nullptr;
  if (!seen_by_nobody) Py_RETURN_NONE;
  return run(native, filled.get());
}

PyMethodDef methods[] = {
    {"watch", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(py_watch)), METH_FASTCALL,
     "watch(ordinary, disturbances, records, wish, wish_of_context, nobody, environment, variable): what to look at."},
    {"plain", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(py_plain)), METH_FASTCALL,
     "plain(*tensors): whether a native op may be called on them, or None, without anybody noticing."},
    {"key", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(py_key)), METH_FASTCALL,
     "key(packed, arguments, rest): under which a plan is known."},
    {"call", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(py_call)), METH_FASTCALL,
     "call(known, native, packed, arguments, rest, *tensors): the op's result by a known plan, None: the long way."},
    {"repeat", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(py_repeat)), METH_FASTCALL,
     "repeat(memory, layer.__dict__, *tensors): the result of a layer's call like the remembered one, None: the long "
     "way."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT,
                      "_eager",
                      "The short way of repeated eager calls; see basisconv_kernels/core/eager.py.",
                      -1,
                      methods,
                      nullptr,
                      nullptr,
                      nullptr,
                      nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__eager() {
  const std::array<std::pair<PyObject**, const char*>, 5> wanted{{{&names.requires_grad, "requires_grad"},
                                                                  {&names.version, "_version"},
                                                                  {&names.data_ptr, "data_ptr"},
                                                                  {&names.stride, "stride"},
                                                                  {&names.shape, "shape"}}};
  for (const auto& [place, text] : wanted) {
    if (*place == nullptr) *place = PyUnicode_InternFromString(text);
    if (*place == nullptr) return nullptr;
  }
  return PyModule_Create(&module);
}
