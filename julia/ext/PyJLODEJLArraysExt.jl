"""
States on JLArrays.jl's arrays: memory of the host's that behaves as a device's does, element by element included, which
is an error there. It stands in for a device in tests.
"""
module PyJLODEJLArraysExt

using JLArrays: DataRef, JLVector
using PyJLODE: PyJLODE, DEVICES, Lent

"Of `DEVICES`."
const KIND = 2

PyJLODE.address_of(a::SubArray{<:Any, <:Any, <:JLVector}) = Ptr{Cvoid}(UInt(pointer(a)))

function PyJLODE.borrow(::Type{JLVector{T}}, lent::Lent) where {T}
    bytes = lent.length == 0 ? UInt8[] : unsafe_wrap(Array, Ptr{UInt8}(lent.address), lent.length * sizeof(T))
    return JLVector{T}(DataRef(Returns(nothing), bytes), (Int(lent.length),))
end

PyJLODE.at_place(f, ::Type{<:JLVector}, ::PyJLODE.Place) = f()

__init__() = (DEVICES[KIND] = T -> JLVector{T}; nothing)

end
