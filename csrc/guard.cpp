#include "guard.h"

#include <torch/csrc/autograd/python_variable.h>

namespace fastconv {

namespace py = pybind11;

struct Guard::Memory {
  std::vector<at::Tensor> tensors;
  std::vector<const void*> pointers;
};

namespace {

PyObject* dictionary(const py::handle& h) {
  if (!PyDict_Check(h.ptr())) throw py::type_error("Guard: entries and sizes expected dicts");
  return h.ptr();
}

}  // namespace

Guard::Guard(const py::list& entries, const py::list& sizes, const py::list& types, const py::list& tensors)
    : memory_(new Memory) {
  if (entries.size() % 3 != 0 || sizes.size() % 2 != 0 || types.size() % 2 != 0)
    throw py::value_error("Guard: entries expected triples, sizes and types pairs");
  const PyObject* missing = py::type::of<Guard>().ptr();
  for (size_t i = 0; i < entries.size(); i += 3) {
    PyObject* value = entries[i + 2].ptr();
    entries_.push_back({dictionary(entries[i]), entries[i + 1].ptr(), value == missing ? nullptr : value});
  }
  for (size_t i = 0; i < sizes.size(); i += 2)
    sizes_.emplace_back(dictionary(sizes[i]), sizes[i + 1].cast<Py_ssize_t>());
  for (size_t i = 0; i < types.size(); i += 2) types_.emplace_back(types[i].ptr(), types[i + 1].ptr());
  for (const py::handle t : tensors) {
    if (!THPVariable_Check(t.ptr())) throw py::type_error("Guard: tensors expected tensors");
    memory_->tensors.push_back(THPVariable_Unpack(t.ptr()));
    memory_->pointers.push_back(memory_->tensors.back().const_data_ptr());
  }
}

Guard::~Guard() { delete memory_; }

bool Guard::holds() const {
  for (const auto& [object, type] : types_) {
    if (reinterpret_cast<PyObject*>(Py_TYPE(object)) != type) return false;
  }
  for (const Entry& e : entries_) {
    PyObject* now = PyDict_GetItemWithError(e.dict, e.key);
    if (now == nullptr && PyErr_Occurred()) throw py::error_already_set();
    if (now != e.value) return false;
  }
  for (const auto& [dict, size] : sizes_) {
    if (PyDict_Size(dict) != size) return false;
  }
  for (size_t i = 0; i < memory_->tensors.size(); ++i) {
    if (memory_->tensors[i].const_data_ptr() != memory_->pointers[i]) return false;
  }
  return true;
}

void define_guard(py::module_& m) {
  py::class_<Guard>(m, "Guard", "Whether objects are still what they were; see csrc/guard.h.")
      .def(py::init<const py::list&, const py::list&, const py::list&, const py::list&>())
      .def("holds", &Guard::holds);
}

}  // namespace fastconv
