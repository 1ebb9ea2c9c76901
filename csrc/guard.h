// Whether Python objects are still what they were: the guard of a plan, asked before every run.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

namespace fastconv {

// Compares by identity, without a line of Python: after a step the objects lie outside the caches, and every one that
// is touched costs a miss. It owns nothing but the tensors' memory handles: whoever makes it keeps the objects, where
// Python's collector can see them.
class Guard {
 public:
  // entries: flat triples dict, key, value (Guard itself as the value: the key must be missing). sizes: dict, length.
  // types: object, type. tensors: their memory must stay where it is.
  Guard(const pybind11::list& entries, const pybind11::list& sizes, const pybind11::list& types,
        const pybind11::list& tensors);
  ~Guard();
  Guard(const Guard&) = delete;
  Guard& operator=(const Guard&) = delete;
  bool holds() const;

 private:
  struct Entry {
    PyObject *dict, *key, *value;
  };
  struct Memory;
  std::vector<Entry> entries_;
  std::vector<std::pair<PyObject*, Py_ssize_t>> sizes_;
  std::vector<std::pair<PyObject*, PyObject*>> types_;
  Memory* memory_;
};

void define_guard(pybind11::module_& m);

}  // namespace fastconv
