#include "signature.h"

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/util/SmallVector.h>
#include <torch/csrc/autograd/python_variable.h>

#include <cstring>

namespace fastconv {

namespace {

using Words = c10::SmallVector<int64_t, 128>;

enum Kind : int64_t { kNone, kFalse, kTrue, kInt, kFloat, kString, kSequence };

void append_text(Words& words, PyObject* text) {
  Py_ssize_t size = 0;
  const char* bytes = PyUnicode_AsUTF8AndSize(text, &size);
  if (bytes == nullptr) throw pybind11::error_already_set();
  words.push_back(kString | static_cast<int64_t>(size) << 8);
  for (Py_ssize_t i = 0; i < size; i += 8) {
    int64_t word = 0;
    std::memcpy(&word, bytes + i, std::min<Py_ssize_t>(8, size - i));
    words.push_back(word);
  }
}

// False where the value is of another kind. 1, True and 1.0 are three values here, as they are to the checks.
bool append_argument(Words& words, PyObject* value) {
  if (value == Py_None) {
    words.push_back(kNone);
  } else if (value == Py_True || value == Py_False) {
    words.push_back(value == Py_True ? kTrue : kFalse);
  } else if (PyLong_CheckExact(value)) {
    int overflow = 0;
    const int64_t number = PyLong_AsLongLongAndOverflow(value, &overflow);
    if (overflow != 0) return false;
    words.push_back(kInt);
    words.push_back(number);
  } else if (PyFloat_CheckExact(value)) {
    const double number = PyFloat_AS_DOUBLE(value);
    int64_t bits = 0;
    std::memcpy(&bits, &number, sizeof bits);
    words.push_back(kFloat);
    words.push_back(bits);
  } else if (PyUnicode_CheckExact(value)) {
    append_text(words, value);
  } else if (PyTuple_Check(value) || PyList_CheckExact(value)) {
    const Py_ssize_t size = PySequence_Fast_GET_SIZE(value);
    words.push_back(kSequence | static_cast<int64_t>(size) << 8);
    for (Py_ssize_t i = 0; i < size; ++i)
      if (!append_argument(words, PySequence_Fast_GET_ITEM(value, i))) return false;
  } else {
    return false;
  }
  return true;
}

}  // namespace

pybind11::object signature(const pybind11::str& op, const pybind11::tuple& tensors, const pybind11::tuple& arguments) {
  Words words;
  append_text(words, op.ptr());
  if (!append_argument(words, arguments.ptr())) return pybind11::none();
  for (const pybind11::handle item : tensors) {
    if (item.is_none()) {
      words.push_back(-1);
      continue;
    }
    if (!THPVariable_Check(item.ptr())) return pybind11::none();
    const at::Tensor& t = THPVariable_Unpack(item.ptr());
    if (t.unsafeGetTensorImpl()->has_symbolic_sizes_strides()) return pybind11::none();
    // A subclass has rules of its own; Parameter is as good as Tensor.
    const bool plain = THPVariable_CheckExact(item.ptr());
    words.push_back(plain ? 0 : reinterpret_cast<int64_t>(Py_TYPE(item.ptr())));
    words.push_back(static_cast<int64_t>(t.key_set().raw_repr()));
    words.push_back(static_cast<int64_t>(t.scalar_type()) | static_cast<int64_t>(t.layout()) << 8 |
                    static_cast<int64_t>(t.requires_grad()) << 16 | static_cast<int64_t>(t.dim()) << 24);
    words.push_back(static_cast<int64_t>(t.device().type()) << 16 | (t.device().index() & 0xffff));
    const bool strided = t.layout() == at::kStrided;
    for (int64_t i = 0; i < t.dim(); ++i) {
      words.push_back(t.size(i));
      if (strided) words.push_back(t.stride(i));
    }
  }
  const auto local = c10::impl::tls_local_dispatch_key_set();
  words.push_back(static_cast<int64_t>(local.included_.raw_repr()));
  words.push_back(static_cast<int64_t>(local.excluded_.raw_repr()));
  words.push_back(static_cast<int64_t>(c10::GradMode::is_enabled()) |
                  static_cast<int64_t>(at::globalContext().deterministicAlgorithms()) << 1 |
                  static_cast<int64_t>(at::get_num_threads()) << 8);
  return pybind11::bytes(reinterpret_cast<const char*>(words.data()), words.size() * sizeof(int64_t));
}

}  // namespace fastconv
