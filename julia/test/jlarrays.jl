# States on JLArrays.jl's arrays: memory of the host's that behaves as a device's does, where to read an element by itself
# is an error. They stand in for a device in tests.

using JLArrays: JLArrays, JLVector
using PyJLODE: PyJLODE, Lent

JLArrays.allowscalar(false)

"Of `PyJLODE.DEVICES`."
const STAND_IN = 2

function PyJLODE.borrow(::Type{JLVector{T}}, lent::Lent) where {T}
    bytes = lent.length == 0 ? UInt8[] : unsafe_wrap(Array, Ptr{UInt8}(lent.address), lent.length * sizeof(T))
    return JLVector{T}(JLArrays.DataRef(Returns(nothing), bytes), (Int(lent.length),))
end

PyJLODE.at_place(f, ::Type{<:JLVector}, ::PyJLODE.Place) = f()

PyJLODE.DEVICES[STAND_IN] = T -> JLVector{T}
